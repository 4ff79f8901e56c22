"""The paper's comparison in one command: cross-attention, controls, prompt, LoRA, FiD; then the tables.

python scripts/compare_methods.py --checkpoint checkpoints/xc-smollm2-135m --lora-prompt checkpoints/lora-prompt
    --lora-closed-book checkpoints/lora-closed-book --tasks xc_squad_sample xc_coqa --control-tasks xc_squad_sample
    --output runs/eval --results results --limit 150 --batch_size 8      # what is not listed below goes to lm-eval
"""

import argparse
import sys
from pathlib import Path

from dataset_builders.provenance import write_result
from xcllama.evaluation.comparison import Models, compare
from xcllama.evaluation.plots import draw
from xcllama.evaluation.tables import load_runs, markdown, summarize


def main() -> int:
    """Parse the command line, run what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", nargs="+", required=True, help="XC models or folders of added weights")
    parser.add_argument("--lora-prompt", help="folder of a LoRA trained with the contexts in its prompt")
    parser.add_argument("--lora-closed-book", help="folder of a LoRA trained without the contexts")
    parser.add_argument("--fid", help="T5 Fusion-in-Decoder folder")
    parser.add_argument("--methods", nargs="+", help="default: all whose model is given")
    parser.add_argument("--tasks", nargs="+", required=True, help="tasks or groups, as xc_offline")
    parser.add_argument("--control-tasks", nargs="+", help="of cross_shuffled and quantized caches (default: --tasks)")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs; a second call goes on")
    parser.add_argument(
        "--results", type=Path, help="folder for eval_CHECKPOINT.json and .png: the first one's hold all methods"
    )
    own, shared = parser.parse_known_args()
    models = Models(own.checkpoint, own.lora_prompt, own.lora_closed_book, own.fid)
    methods = own.methods or models.default_methods()
    try:
        failures = compare(models, methods, own.output, own.tasks, own.control_tasks or own.tasks, shared)
        first, *others = (Path(checkpoint).name for checkpoint in own.checkpoint)
        folders = {first: [own.output]} | {name: [own.output / name, own.output / "baselines"] for name in others}
        summaries = {name: summarize(load_runs(places)) for name, places in folders.items()}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(summaries[first]))
    for name, summary in summaries.items() if own.results else ():
        write_result(own.results / f"eval_{name}.json", summary, seed=0)
        draw(summary, own.results / f"eval_{name}.png")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
