"""How many layers read, from how many cached states: loss without training, bytes and time a token.

python scripts/reading_layers.py [--base ID] [--texts N] [--results results/reading_layers.json]

Projections of every layer are fitted by least squares to passages of OpenStax books (CC BY 4.0); then the layers that
bring most on held-out passages read alone, 4 and more of them. Steps are timed at 4,096 cached tokens beside the
decoder's own keys and values of as many tokens, in turns. Takes a quarter of an hour on one core.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from load_model import BASE, ROOT
from reading_layers_plot import draw
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from dataset_builders import build_mix
from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor
from modeling_xcllama.checkpoints import find_model
from modeling_xcllama.least_squares import fit_least_squares
from xcllama.provenance import require_clean, write_result
from xcllama.training.fit import HeldOut, gains
from xcllama.training.teacher import Teacher

MEASURED = ("modeling_xcllama", "xcllama/training/fit.py", "scripts/reading_layers.py")
STATES = ([18], [8, 18])
COUNTS = (4, 6, 8, 10, 12, 16, 20, 24, 30)
CONTEXT, STEPS, SIXTEEN_BITS = 4096, 7, 2


def passages(tokenizer, count: int) -> list[list[int]]:
    """Token ids of the first `count` passages of some length, 384 tokens of each at most."""
    found: list[list[int]] = []
    for row in build_mix(["openstax"], seed=0).rows("train"):
        ids = tokenizer(row["contexts_list"][0], add_special_tokens=False)["input_ids"][:384]
        if len(ids) >= 128:
            found.append(ids)
        if len(found) == count:
            break
    return found


def rows_of(base, states: list[int], prefix: list[int], texts: list[list[int]], held_out: HeldOut) -> list[dict]:
    """A row for each number of reading layers."""
    fields = {"cross_attention_mode": "joint", "context_prefix": prefix, "context_layer": states}
    model = XCLlamaForCausalLM.from_decoder(base, init="random", **fields).eval()
    fit_least_squares(model, texts)
    contexts = held_out.cached(model)
    everything = held_out.loss(model, contexts)
    ranked = sorted((gain, layer) for layer, gain in gains(held_out, model, contexts, everything).items())[::-1]
    found = []
    for count in COUNTS:
        layers = sorted(layer for _, layer in ranked[:count])
        found.append(
            {
                "states": states,
                "layers": layers,
                "loss": everything if count == len(ranked) else held_out.loss(model, contexts, layers),
                "stored_bytes_per_token": SIXTEEN_BITS * model.config.context_width,
                "resident_bytes_per_token": count * kv_bytes(base.config) // base.config.num_hidden_layers,
            }
        )
        print(f"states {states}, {count:2d} layers: loss {found[-1]['loss']:.3f}", flush=True)
    return found


def kv_bytes(config) -> int:
    """Bytes of the decoder's own keys and values of a token."""
    return 2 * SIXTEEN_BITS * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


@torch.no_grad()
def step_seconds(base, prefix: list[int], counts: tuple[int, ...]) -> dict[int | str, float]:
    """Median seconds of one step after `CONTEXT` tokens: cached for `count` reading layers, and in the prompt."""
    ids = torch.randint(10, base.config.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    token, prompt = ids[:, :1], DynamicCache(config=base.config)
    shape = (1, base.config.num_key_value_heads, CONTEXT, base.config.head_dim)
    for layer in range(base.config.num_hidden_layers):
        prompt.update(torch.randn(shape, dtype=base.dtype), torch.randn(shape, dtype=base.dtype), layer)
    cases, fields = {}, {"cross_attention_mode": "joint", "context_prefix": prefix, "context_layer": 18}
    for count in counts:
        model = XCLlamaForCausalLM.from_decoder(
            base, init="random", cross_attention_layers=list(range(count)), **fields
        ).eval()
        context = model.project_context(model.encode_context(ids))
        cases[count] = lambda model=model, context=context: model(token, context_cache=context, use_cache=False)

    def read_prompt() -> None:
        base(token, past_key_values=prompt)
        prompt.crop(-1)

    cases["prompt"] = read_prompt
    seconds = {name: [] for name in cases}
    for _ in range(STEPS + 1):
        for name, case in cases.items():
            begin = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - begin)
    return {name: median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE, help="folder or Hub id of the decoder")
    parser.add_argument("--texts", type=int, default=160, help="passages to fit on; 12 more are held out")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "reading_layers.json")
    arguments = parser.parse_args()
    require_clean(arguments.results)
    torch.manual_seed(0)
    name = find_model(arguments.base)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    processor = XCLlamaProcessor(AutoTokenizer.from_pretrained(name))
    prefix, texts = processor.context_prefix(), passages(processor.tokenizer, arguments.texts + 12)
    held_out = HeldOut(texts[:12], prefix)
    teacher = Teacher(base, prefix)
    exact = [teacher.read([torch.tensor(first)], (0,)) for first, _ in held_out.halves]
    figures = {
        "base": arguments.base,
        "loss_prompt": held_out.loss(teacher.model, exact),
        "loss_without": held_out.loss(teacher.model, [None] * len(exact)),
        "prompt_bytes_per_token": kv_bytes(base.config),
        "rows": [row for states in STATES for row in rows_of(base, states, prefix, texts[12:], held_out)],
    }
    seconds = step_seconds(base, prefix, COUNTS)
    figures |= {"context_tokens": CONTEXT, "prompt_step_seconds": seconds["prompt"]}
    for row in figures["rows"]:
        row["step_seconds"] = seconds[len(row["layers"])]
    write_result(arguments.results, figures, MEASURED, seed=0)
    draw(figures, arguments.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
