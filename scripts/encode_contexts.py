"""Encode a corpus into a snapshot: a folder, s3://bucket/folder or hf://datasets/org/name; run again to go on.

python scripts/encode_contexts.py --input corpus.parquet --output FOLDER_OR_URL
accelerate launch --num_processes 4 scripts/encode_contexts.py --input org/dataset --output s3://bucket/corpus
python scripts/encode_contexts.py --engine ray --workers 8 --gpus 1 --input "data/*.parquet" --output s3://bucket/corpus
"""

import argparse
import functools
import sys

from load_model import load_model

from context_store.bulk import CHARACTERS_PER_SHARD, Settings, encode_task, finish, load_plan, run_on_ray


def encode_here(arguments: argparse.Namespace, settings: Settings) -> None:
    """One process, or the processes of `accelerate launch`: process i makes shards i, i + n, ..."""
    from accelerate import PartialState
    from tqdm import tqdm

    state = PartialState(cpu=not arguments.gpus)
    with state.main_process_first():
        tasks = load_plan(arguments.input, settings, arguments.characters_per_shard)
    model, processor = load_model(arguments.model)
    model.to(state.device)
    own = tasks[state.process_index :: state.num_processes]
    for task in tqdm(own, unit="shard", disable=None if state.is_main_process else True):
        encode_task(task, model, processor, settings)
    state.wait_for_everyone()
    if state.is_main_process:
        report(arguments, finish(tasks, settings, model.model.context_fingerprint(), **card(arguments)))


def encode_on_ray(arguments: argparse.Namespace, settings: Settings) -> None:
    """The actors of a Ray cluster (`RAY_ADDRESS`, else one that is started here)."""
    tasks = load_plan(arguments.input, settings, arguments.characters_per_shard)
    load = functools.partial(load_model, arguments.model)
    options = {"concurrency": arguments.workers, "num_gpus": arguments.gpus}
    fingerprint = run_on_ray(tasks, load, settings, **options)
    report(arguments, finish(tasks, settings, fingerprint, **card(arguments)))


def card(arguments: argparse.Namespace) -> dict:
    """What the snapshot's card says."""
    return {"title": arguments.title, "license_id": arguments.license}


def report(arguments: argparse.Namespace, manifest) -> None:
    """Say what is there now."""
    print(
        f"{manifest.documents} documents, {manifest.tokens:,} tokens, {manifest.nbytes:,} bytes of {manifest.dtype} "
        f"in {len(manifest.shards)} shards: {arguments.output}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="Parquet file, folder, glob, URL, or data set id on the Hub")
    parser.add_argument("--output", required=True, help="folder or fsspec URL")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--workers", type=int, default=1, help="actors of --engine ray")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker; 0: CPU")
    parser.add_argument("--model", help="added weights, model folder or Hub id; default: the repository's checkpoint")
    parser.add_argument("--dtype", default="auto", help="of the states at rest: auto, int8, int4, ...")
    parser.add_argument("--id-column", default="id")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--characters-per-shard", type=int, default=CHARACTERS_PER_SHARD)
    parser.add_argument("--title", default="Encoded contexts")
    parser.add_argument("--license", default="other", help="of the texts")
    arguments = parser.parse_args()
    names = ("output", "dtype", "id_column", "text_column", "namespace")
    fields = {name: getattr(arguments, name) for name in names}
    settings = Settings(**fields, model_name=arguments.model or "xc-smollm2-135m")
    try:
        (encode_on_ray if arguments.engine == "ray" else encode_here)(arguments, settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
