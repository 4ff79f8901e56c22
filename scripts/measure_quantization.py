"""What outliers cost quantized caches, before (one scale for all values of a group) and after (two of them kept).

    python scripts/measure_quantization.py --output results/quantization.json

Real states of the default checkpoint on passages of the development split: how far their largest values stand out, the
relative error of what is not an outlier, and token F1 and the loss of the right answers on the same questions.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from load_model import CHECKPOINT
from torch import Tensor

from modeling_xcllama.quantized_tensor import NUM_OUTLIERS, quantization_heads, quantize
from xcllama.evaluation.metrics import f1
from xcllama.evaluation.questions import read_questions
from xcllama.evaluation.reader import Reader, Request
from xcllama.provenance import require_clean, write_result

MEASURED = ("modeling_xcllama/quantized_tensor.py", "scripts/measure_quantization.py")
SOURCE, SPLIT = "squad_sample", "dev"
# times that a channel is larger than it was
FACTOR = 300


def quantize_plainly(states: Tensor, bits: int) -> Tensor:
    """`states` `[tokens, groups, 64]` as they came back before outliers were kept: all values share a scale."""
    if bits == 8:
        scale = (states.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-14)
        return (states / scale).round().clamp(-127, 127) * scale
    low, high = states.amin(-1, keepdim=True), states.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=2.0**-14)
    return ((states - low) / scale).round().clamp(0, 15) * scale + low


def grouped(states: Tensor) -> Tensor:
    """Hidden states `[tokens, width]` in the groups that they are quantized in, float32."""
    return states.float().unflatten(1, (quantization_heads(states.shape[1]), -1))


def errors(states: Tensor) -> dict[str, float]:
    """Relative errors of `[tokens, groups, 64]`, without the two largest values of each group."""
    largest = states.abs().topk(NUM_OUTLIERS, dim=-1).indices
    rest = torch.ones_like(states).scatter(-1, largest, 0)
    found = {}
    for bits in (8, 4):
        ways = {"before": quantize_plainly(states, bits), "after": quantize(states, bits).dequantize(torch.float32)}
        for way, got in ways.items():
            found[f"int{bits}_{way}"] = float(((got - states) * rest).norm() / (states * rest).norm())
    return found


def standing_out(states: Tensor) -> dict[str, float]:
    """How far values stand out of the others of their token and group, at most and in the middle of all groups."""
    ratio = states.abs().amax(-1) / states.abs().median(-1).values.clamp(min=1e-6)
    return {"most": float(ratio.max()), "median": float(ratio.median())}


def state_records(states: Tensor, first: list[int]) -> list[dict]:
    """Errors of the first token of each passage, of all others, and of states with channels made larger."""
    is_first = torch.zeros(len(states), dtype=torch.bool)
    is_first[first] = True
    groups = grouped(states)
    kinds = {"first token of a passage": groups[is_first], "all other tokens": groups[~is_first]}
    for count in (1, 2, 3):
        larger = groups[~is_first].clone()
        larger[..., :count] *= FACTOR
        kinds[f"all other tokens, {count} of 64 channels x {FACTOR}"] = larger
    return [{"tokens": kind, "stands_out": standing_out(part), **errors(part)} for kind, part in kinds.items()]


def score(reader: Reader, requests: list[Request], dtype: str) -> dict[str, float]:
    """Token F1 and the mean loss of the right answers."""
    answers = reader.answer(requests, "cache", dtype)
    scores = [f1(answer.text, request.question.answers) for answer, request in zip(answers, requests, strict=True)]
    return {"f1": sum(scores) / len(scores), "loss": sum(answer.loss for answer in answers) / len(answers)}


def measure(questions: int, max_new_tokens: int) -> dict[str, object]:
    """All figures."""
    reader = Reader.load(str(CHECKPOINT), max_new_tokens=max_new_tokens)
    asked = read_questions(SOURCE, SPLIT)[:questions]
    requests = [Request(question, question.contexts) for question in asked]
    qualities = {"bfloat16": score(reader, requests, "bfloat16")}
    cache = reader._caches["bfloat16"]
    hidden = cache.states["hidden"]
    for bits in (8, 4):
        before = quantize_plainly(grouped(hidden), bits).flatten(1).to(torch.bfloat16)
        reader._caches[f"int{bits} before"] = replace(cache, states={"hidden": before})
        qualities[f"int{bits} before"] = score(reader, requests, f"int{bits} before")
        qualities[f"int{bits} after"] = score(reader, requests, f"int{bits}")
    states = state_records(hidden, [start for start in cache.offsets[:-1] if start < len(hidden)])
    sizes = {"questions": len(asked), "passages": len(cache.offsets) - 1, "tokens": len(hidden)}
    return {"checkpoint": CHECKPOINT.name, **sizes, "states": states, "quality": qualities}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--output", type=Path, help="JSON with the figures")
    arguments = parser.parse_args()
    require_clean(arguments.output)
    torch.set_num_threads(1)
    figures = measure(arguments.questions, arguments.max_new_tokens)
    print(json.dumps(figures, indent=1))
    if arguments.output:
        write_result(arguments.output, figures, MEASURED)


if __name__ == "__main__":
    main()
