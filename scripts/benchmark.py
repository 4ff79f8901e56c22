"""First token, decoding and encoding beside what people would pick instead, and beside what the machine allows.

python scripts/benchmark.py [--quick] [--only PART ...] [--results results/benchmark.json] [--plots results]

Everything in one process, the cases in turns, medians and quartiles; tokens are timed at a streamer. Ends within 20
minutes on two quiet cores (`--quick`: 5 minutes, up to 2k tokens, nothing compiled); what is measured is written after
every part.
"""

import argparse
import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from benchmark_batches import measure_batch, measure_encoding, measure_lookup
from benchmark_peer import is_available, measure_peer
from benchmark_plots import draw
from benchmark_ratios import ratios
from benchmark_requests import Requests
from benchmark_setup import SEED, Models, measure_limits
from load_model import ROOT

from xcllama.provenance import require_clean, write_result

MEASURED = ("modeling_xcllama", *(f"scripts/{path.name}" for path in Path(__file__).parent.glob("benchmark*.py")))


def parts(models: Models, arguments: argparse.Namespace) -> dict[str, Callable[[], dict]]:
    """Every part of the benchmark by name, in the order in which they run: what the targets are for comes first."""
    quick = arguments.quick
    aimed = 2048 if quick else 4096
    found = {f"context_{aimed}": partial(one_request, models, arguments, aimed)}
    found |= batch_parts(models, (512,), (8, 32)) if quick else batch_parts(models, (aimed,), (1, 32, 8))
    found[f"peer_{aimed}"] = partial(peer, models, arguments, aimed)
    found["encoding"] = partial(measure_encoding, models, 16 if quick else 32, 2)
    found["context_lookup"] = partial(measure_lookup, models, aimed, 2 if quick else 3)
    if not quick:
        # takes a minute a model: one length
        found[f"compiled_{aimed}"] = partial(compiled, models, arguments, aimed)
    others = (512,) if quick else (512, 2048, 8192)
    found |= {f"context_{length}": partial(one_request, models, arguments, length) for length in others}
    found |= {f"peer_{length}": partial(peer, models, arguments, length) for length in others}
    return found if quick else found | batch_parts(models, others, (1, 8, 32))


def batch_parts(models: Models, lengths: tuple[int, ...], batches: tuple[int, ...]) -> dict[str, Callable[[], dict]]:
    """Many rows at a time; a KV prefix for each row where that fits into memory."""
    return {
        f"batch_{rows}_context_{length}": partial(measure_batch, models, length, rows, length * rows <= 32768)
        for length in lengths
        for rows in batches
    }


def one_request(models: Models, arguments: argparse.Namespace, length: int) -> dict:
    """One request at a time on a context of `length` tokens."""
    quick = arguments.quick
    # most rounds at the length that the targets are for
    rounds = 2 if quick else 5 if length == 4096 else 3
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        requests = Requests(models, length, Path(folder))
        return {
            "requests": requests.measure(rounds, 1 if length > 4096 else 2, quick),
            "cross_attention": requests.cross_attention(),
            "peaks": requests.peaks(),
            "encode_seconds": requests.encode_seconds(),
        }


def peer(models: Models, arguments: argparse.Namespace, length: int) -> dict | str:
    """llama.cpp at `length`, or a word that it is not there."""
    if not is_available():
        return "skipped: llama.cpp is not installed (pip install xllamacpp)"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        return measure_peer(models, length, Path(folder), 2 if arguments.quick else 3)


def compiled(models: Models, arguments: argparse.Namespace, length: int) -> dict:
    """Compiled steps over static caches at `length`."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        return {"requests": Requests(models, length, Path(folder)).compiled()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short contexts, few rounds, nothing compiled")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "benchmark.json")
    parser.add_argument("--plots", type=Path, default=ROOT / "results", help="folder of the plots")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone, as context_4096 or encoding")
    parser.add_argument("--folder", type=Path, help="where cache files are written: the disk that is measured")
    arguments = parser.parse_args()
    require_clean(arguments.results)
    arguments.plots.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(SEED)
    results: dict = {"quick": arguments.quick}
    begin = time.perf_counter()

    def save(name: str, figures) -> None:
        if name.startswith("compiled_") and (measured := f"context_{name.split('_')[1]}") in results:
            results[measured]["requests"] |= figures["requests"]
        else:
            results[name] = figures
        write_result(arguments.results, results | {"ratios": ratios(results)}, MEASURED, seed=SEED)
        print(f"{time.perf_counter() - begin:6.0f} s  {name}", flush=True)

    models = Models()
    save("limits", measure_limits(models))
    save("kvpress", version("kvpress") if importlib.util.find_spec("kvpress") else "not installed")
    runs = parts(models, arguments)
    if unknown := set(arguments.only or ()) - set(runs):
        parser.error(f"--only knows {', '.join(runs)}, got {', '.join(sorted(unknown))}.")
    for name in arguments.only or runs:
        save(name, runs[name]())
    draw(results, arguments.plots)
    for name, row in ratios(results).items():
        print(f"{name:70} {row['value']:8.2f}  {'' if row['target'] is None else 'target ' + str(row['target'])}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
