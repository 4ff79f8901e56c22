"""Prove, time and train this project on the GPU of this machine, within a given time and without a network.

python scripts/gpu_check.py --output results/gpu                # kernels, model, training: before 9 minutes are over
python scripts/gpu_check.py --output OUT --parts kernels model  # some of it
python scripts/gpu_check.py --pack DIR                          # two archives for a machine without a network
python scripts/gpu_check.py --output OUT --dry-run              # tiny sizes on a CPU, kernels in Triton's interpreter
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# a packed folder brings this project, and what may not be installed
PACKAGES = ROOT / "packages"


def add_packages() -> None:
    """Make the packages of a packed folder known to this process and to those it starts."""
    known = os.environ.get("PYTHONPATH")
    needed = [folder for folder in sorted(PACKAGES.glob("*")) if importlib.util.find_spec(folder.name) is None]
    if needed:
        sys.path[:0] = map(str, needed)
        os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, needed), *([known] if known else [])])


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: neither `--output` nor `--pack`.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["kernels", "model", "train"]
    parser.add_argument("--output", type=Path, help="folder of the results and of the trained weights")
    parser.add_argument("--minutes", type=float, default=9.0, help="everything ends before (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--base", type=Path, help="folder of SmolLM2-135M-Instruct (default: packed or fetched)")
    parser.add_argument("--data", type=Path, help="folder of a token pool (default: packed, or made once)")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the CPU; without --base a random decoder"
    )
    parser.add_argument(
        "--pack", type=Path, metavar="DIR", help="write what a machine without a network needs, and end"
    )
    # how the check starts itself for one part, with the end on time.monotonic's clock
    parser.add_argument("--part", choices=parts, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.output is None and arguments.pack is None:
        parser.error("name --output, a folder for the results, or --pack.")
    if arguments.dry_run and (arguments.base is None) != (arguments.data is None):
        parser.error("a dry run takes --base and --data together: the tokens are those of the decoder.")
    return arguments


def main() -> int:
    arguments = parse()
    add_packages()
    # imports of what a packed folder brings, and of little else: parts are processes of their own
    from xcllama.gpu_check.driver import Check, run_check
    from xcllama.gpu_check.packing import default_folders, pack

    if arguments.pack is not None:
        for archive in pack(arguments.pack):
            print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")
        return 0
    output, base, data, dry_run = arguments.output.resolve(), arguments.base, arguments.data, arguments.dry_run
    if arguments.part is not None:
        from xcllama.gpu_check.options import Options
        from xcllama.gpu_check.part import run_part

        return run_part(arguments.part, Options(output, arguments.deadline, base, data, dry_run))
    if not dry_run:
        base, data = default_folders(base, data)
    return run_check(Check(output, arguments.minutes, tuple(arguments.parts), base, data, dry_run), Path(__file__))


if __name__ == "__main__":
    sys.exit(main())
