"""Every way to give a model its texts, on the same questions: answers, paired differences, what is not in the text.

python scripts/compare_methods.py --checkpoint checkpoints/xc-smollm2-135m --lora-prompt checkpoints/lora-prompt
    --lora-closed-book checkpoints/lora-closed-book --split dev --output runs/compare --results results
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from dataset_builders.provenance import write_result
from xcllama.evaluation.comparison import METHODS, Models, Settings, compare
from xcllama.evaluation.not_in_text import store_threshold, stored_threshold
from xcllama.evaluation.plots import draw
from xcllama.evaluation.tables import answers_of, load_runs, markdown, summarize


def main() -> int:
    """Parse the command line, answer what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", nargs="+", required=True, help="folders of added weights")
    parser.add_argument("--lora-prompt", help="folder of a LoRA trained with the contexts in its prompt")
    parser.add_argument("--lora-closed-book", help="folder of a LoRA trained without the contexts")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--source", nargs="+", default=["squad_sample"], help="of the questions, see dataset_builders")
    parser.add_argument("--split", required=True, help="dev (for choices), test (once a release), ...")
    parser.add_argument("--limit", type=int, help="so many questions of each source")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="of all runs; a second call goes on")
    parser.add_argument("--results", type=Path, help="folder for eval_CHECKPOINT.json and .png; the first has all")
    parser.add_argument(
        "--store-threshold",
        action="store_true",
        help="let the checkpoints decline what scores below the one chosen here",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    models = Models(arguments.checkpoint, arguments.lora_prompt, arguments.lora_closed_book)
    dtype, paths = getattr(torch, arguments.dtype), []
    try:
        for source in arguments.source:
            settings = Settings(
                source, arguments.split, limit=arguments.limit, max_new_tokens=arguments.max_new_tokens
            )
            methods = arguments.methods or models.default_methods(source)
            paths += compare(models, methods, settings, arguments.output, dtype, arguments.device)
        runs = load_runs(paths)
        for folder in arguments.checkpoint if arguments.store_threshold else ():
            print(f"{folder} declines answers below {store_threshold(folder, answers_of(runs, folder))}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    thresholds = {Path(folder).name: stored_threshold(folder) for folder in arguments.checkpoint}
    print(markdown(summarize(runs, thresholds)))
    for number, name in enumerate(thresholds) if arguments.results else ():
        # the others' hold their own methods and the baselines
        shown = [run for run in runs if number == 0 or run.model == name or run.model not in thresholds]
        summary = summarize(shown, thresholds)
        write_result(arguments.results / f"eval_{name}.json", summary, seed=0)
        draw(summary, arguments.results / f"eval_{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
