"""The paper's comparison in one command: cross-attention, controls, prompt, LoRA, FiD; then the tables.

python scripts/compare_methods.py --checkpoint checkpoints/xc-smollm2-135m --output runs/eval --tasks xc_offline
    --limit 100 --batch_size 16 --results results/eval_xc-smollm2-135m.json   # others go to lm-eval
"""

import argparse
import sys
from pathlib import Path

from dataset_builders.provenance import write_result
from lm_eval_tasks.comparison import METHODS, compare
from lm_eval_tasks.tables import load_runs, markdown, summarize


def main() -> int:
    """Parse the command line, run what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, help="XC checkpoint: folder of added weights, or model repo")
    parser.add_argument("--adapter", help="folder of a LoRA adapter: adds the method lora_prompt")
    parser.add_argument("--fid", help="T5 Fusion-in-Decoder folder: adds the method fid")
    parser.add_argument("--methods", nargs="+", help=f"default: {' '.join(METHODS)} and those whose model is given")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs; a second call goes on")
    parser.add_argument("--results", type=Path, help="write all figures to this JSON, for cards")
    own, shared = parser.parse_known_args()
    given = {"lora_prompt": own.adapter, "fid": own.fid}
    methods = own.methods or [*METHODS, *(method for method, model in given.items() if model)]
    try:
        failures = compare(own.output, own.checkpoint, methods, shared, own.adapter, own.fid)
        summary = summarize(load_runs([own.output]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(summary))
    if own.results:
        write_result(own.results, summary, seed=0)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
