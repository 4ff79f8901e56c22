"""First token, decoding and encoding beside what people would pick instead, and beside what the machine allows.

python scripts/benchmark.py [--quick] [--results results/benchmark.json] [--plots results]

Everything in one process, the cases in turns, medians and quartiles; tokens are timed at a streamer. Ends within 20
minutes on two quiet cores (`--quick`: 5 minutes, up to 2k tokens, nothing compiled); what is measured is written after
every part.
"""

import argparse
import importlib.util
import logging
import tempfile
import time
from pathlib import Path

import torch
from benchmark_batches import measure_batch, measure_encoding, measure_lookup
from benchmark_plots import draw
from benchmark_ratios import ratios
from benchmark_requests import Requests
from benchmark_setup import SEED, Models, measure_limits
from load_model import ROOT

from dataset_builders.provenance import write_result


def kvpress_state() -> str:
    """Why kvpress is not among the cases."""
    if importlib.util.find_spec("kvpress") is None:
        return "not installed"
    return "installed, not measured: its presses compress a KV cache after the prefill, which `KV prefix` has already"


def measure(arguments: argparse.Namespace, save) -> None:
    """Run every part; `save(name, figures)` after each."""
    quick = arguments.quick
    models = Models()
    save("limits", measure_limits(models))
    save("kvpress", kvpress_state())
    lengths = (512, 2048) if quick else (512, 2048, 4096, 8192)
    # compiling takes a minute a model: one length, the one that the targets are for
    compiled = () if quick else (4096,)
    for length in lengths:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            requests = Requests(models, length, Path(folder))
            long = length > 2048
            figures = {"requests": requests.measure(3 if quick or long else 5, 1 if long else 2, quick)}
            figures["cross_attention"] = requests.cross_attention()
            figures["peaks"] = requests.peaks()
            figures["encode_seconds"] = requests.encode_seconds()
            save(f"context_{length}", figures)
            if length in compiled:
                figures["requests"] |= requests.compiled()
                save(f"context_{length}", figures)
    # what one row of 4k costs is what 32 are compared with
    for length, rows in ((512, 8), (512, 32)) if quick else ((512, 8), (512, 32), (4096, 1), (4096, 8), (4096, 32)):
        save(f"batch_{rows}_context_{length}", measure_batch(models, length, rows, with_prefix=length * rows <= 32768))
    save("encoding", measure_encoding(models, 16 if quick else 48, 2 if quick else 3))
    save("context_lookup", measure_lookup(models, min(4096, lengths[-1]), 2 if quick else 3))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short contexts, few rounds, nothing compiled")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "benchmark.json")
    parser.add_argument("--plots", type=Path, default=ROOT / "results", help="folder of the plots")
    parser.add_argument("--folder", type=Path, help="where cache files are written: the disk that is measured")
    arguments = parser.parse_args()
    arguments.plots.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(SEED)
    results: dict = {"quick": arguments.quick}
    begin = time.perf_counter()

    def save(name: str, figures) -> None:
        results[name] = figures
        write_result(arguments.results, results | {"ratios": ratios(results)}, seed=SEED)
        print(f"{time.perf_counter() - begin:6.0f} s  {name}", flush=True)

    measure(arguments, save)
    draw(results, arguments.plots)
    for name, row in ratios(results).items():
        print(f"{name:70} {row['value']:8.2f}  {'' if row['target'] is None else 'target ' + str(row['target'])}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
