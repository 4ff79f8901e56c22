"""What the fingerprint of a cache costs: bytes of weights that are read, counted on configs, and CPU seconds of them.

    python scripts/measure_fingerprint.py --output results/fingerprint.json

The model is built on no memory (the meta device). Bytes are exact; seconds are those of this machine's processor, as
the process was charged for, for the share of the weights that is timed.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from result_tables import DECODERS, decoder_config
from torch import Tensor

from modeling_xcllama import XCLlamaModel
from modeling_xcllama.effective_weights import effective_weights
from modeling_xcllama.fingerprint import SMALL_MODEL_BYTES, bits_sample, sampled_part, weights_digest
from xcllama.provenance import require_clean, write_result

MEASURED = (
    "modeling_xcllama/fingerprint.py",
    "modeling_xcllama/effective_weights.py",
    "scripts/measure_fingerprint.py",
)
VOCABULARIES = {"Llama-2-7B": (32000, 11008), "Llama-3-8B": (128256, 14336), "SmolLM2-135M": (49152, 1536)}
TIMED_BYTES = 1 << 28


def encoding_weights(name: str, context_layer: int | None) -> dict[str, Tensor]:
    """The weights that shape the states of an XC model on a decoder, in bfloat16, without memory."""
    vocabulary, inner = VOCABULARIES[name]
    config = decoder_config(name, context_layer=context_layer, vocab_size=vocabulary, intermediate_size=inner)
    with torch.device("meta"):
        model = XCLlamaModel(config).to(torch.bfloat16)
    return effective_weights(model._encoding_modules("hidden")).tensors


def cpu_seconds(function, tensors: dict[str, Tensor]) -> float:
    """Of the quickest of three calls."""
    taken = []
    for _ in range(3):
        begin = time.process_time()
        function(tensors)
        taken.append(time.process_time() - begin)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON with the figures")
    arguments = parser.parse_args()
    require_clean(arguments.output)
    torch.set_num_threads(1)
    records = []
    for name in DECODERS:
        for layer in (None, DECODERS[name][0] // 2):
            weights = encoding_weights(name, layer)
            total = sum(weight.nbytes for weight in weights.values())
            sample = sum(sampled_part(weight).nbytes for weight in weights.values())
            kept = total if total <= SMALL_MODEL_BYTES else sample
            records.append({"decoder": name, "context_layer": layer, "whole_bytes": total, "sampled_bytes": kept})
    rows = TIMED_BYTES // (2 * 4096)
    timed = {"weight": torch.nn.Parameter(torch.randn(rows, 4096).to(torch.bfloat16))}
    gigabytes = TIMED_BYTES / 1e9
    seconds = {
        "whole_seconds_per_gigabyte": cpu_seconds(lambda own: weights_digest(own.items()), timed) / gigabytes,
        "sampled_seconds_per_gigabyte": cpu_seconds(bits_sample, timed) / gigabytes,
    }
    figures = {"models": records, **seconds}
    print(json.dumps(figures, indent=1))
    if arguments.output:
        write_result(arguments.output, figures, MEASURED)


if __name__ == "__main__":
    main()
