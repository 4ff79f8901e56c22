"""Train a recipe: python scripts/train.py --recipe xcllama/training/recipes/NAME.yaml [--resume] [--dry-run]

On several GPUs or processes: accelerate launch --num_processes 8 scripts/train.py --recipe FILE (DDP, or FSDP as
accelerate is told).
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from dataset_builders.provenance import write_result
from xcllama.training.recipe import load_recipe


def main() -> int:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a YAML file, see xcllama/training/recipes/")
    parser.add_argument("--run-folder", type=Path, help="where checkpoints and the log go (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run folder")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory and steps, train nothing")
    parser.add_argument("--no-training", action="store_true", help="export the newest checkpoint as it is")
    parser.add_argument("--export", type=Path, help="write the trained weights, recipe and curve to this folder")
    parser.add_argument(
        "--results", type=Path, help="write a results file, with the loss of held-out answers, to this folder"
    )
    parser.add_argument("--questions", type=int, default=200, help="held-out questions of the results file")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        recipe = load_recipe(arguments.recipe)
        if arguments.dry_run:
            from xcllama.training.dry_run import plan

            print(json.dumps(plan(recipe), indent=2))
            return 0
        return _train(recipe, arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _train(recipe, arguments: argparse.Namespace) -> int:
    from xcllama.training.loop import DivergedError
    from xcllama.training.run import load_run, run_recipe

    folder = arguments.run_folder or Path("runs") / recipe.name
    try:
        model = load_run(recipe, folder) if arguments.no_training else run_recipe(recipe, folder, arguments.resume)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    if int(os.environ.get("RANK", "0")) == 0:
        from xcllama.publishing.model_card import readme
        from xcllama.training.export import export_model, training_figures

        if arguments.export:
            export_model(recipe, model, folder, arguments.export)
        if arguments.results:
            figures = training_figures(recipe, model, folder, arguments.questions)
            write_result(arguments.results / f"training_{recipe.name}.json", figures, recipe.seed)
        if arguments.export:
            (arguments.export / "README.md").write_text(readme(arguments.export, arguments.results or Path("results")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
