"""Build one source on a cluster through datatrove; the same command again does what is missing.

    python scripts/build_dataset_cluster.py --source natural_questions --path "s3://bucket/nq-train-*.jsonl.gz" \\
        --output /shared/nq --work /shared/nq.work --tasks 50 --executor slurm --partition cpu --time 04:00:00
"""

import argparse
import sys

from dataset_builders import SOURCES, Settings
from dataset_builders.cluster import EXECUTORS, cluster_build
from dataset_builders.natural_questions import read_nq_open


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, choices=list(SOURCES))
    parser.add_argument("--path", required=True, help="file, URL or pattern")
    parser.add_argument("--output", required=True, help="new folder for the build")
    parser.add_argument("--work", required=True, help="folder that all tasks see, for parts and logs")
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--workers", type=int, default=-1, help="tasks at a time; -1: all")
    parser.add_argument("--executor", choices=EXECUTORS, default="local")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on-error", choices=["limit", "raise", "drop"], default="limit")
    parser.add_argument("--num-copies", type=int, default=1, help="HotpotQA: rows a question, shuffled differently")
    parser.add_argument("--nq-open", help="Natural Questions: keep the questions of these NQ-open files")
    parser.add_argument("--partition", help="Slurm partition")
    parser.add_argument("--time", help="Slurm time limit, e.g. 04:00:00")
    options = parser.parse_args()
    if (options.executor == "slurm") != (options.partition is not None and options.time is not None):
        parser.error("--partition and --time go with --executor slurm, which needs both")
    return options


def main() -> int:
    options = parse_arguments()
    slurm = {"partition": options.partition, "time": options.time} if options.executor == "slurm" else {}
    try:
        nq_open = read_nq_open(options.nq_open) if options.nq_open else None
        build = cluster_build(
            options.source,
            options.path,
            options.output,
            options.work,
            options.tasks,
            options.executor,
            Settings(seed=options.seed, num_copies=options.num_copies, nq_open=nq_open),
            options.on_error,
            options.workers,
            **slurm,
        )
        build.run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
