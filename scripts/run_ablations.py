"""Train one short run a choice, all from one recipe, and tabulate what each costs or gives.

python scripts/run_ablations.py [--rows NAME...] [--runs runs/ablation] [--results results/ablations.json]

A row that was trained before is not trained again, an interrupted one goes on.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import yaml

from dataset_builders.provenance import write_result
from training.checkpoints import checkpoints
from training.export import quick_look
from training.recipe import Recipe, recipe_from_dict
from training.run import load_run, run_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "training/recipes/ablation.yaml"
# row -> what differs from the recipe
ROWS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "states of the last layer": {"model.config.context_layer": None},
    "states at three quarters": {"model.config.context_layer": 23},
    "states at a half": {"model.config.context_layer": 15},
    "states at a quarter": {"model.config.context_layer": 8},
    "projections copied": {"model.least_squares_passages": 0},
    "projections random": {"model.init": "random", "model.least_squares_passages": 0},
    "every second layer": {"model.config.cross_attention_layers": [14, 16, 18, 20, 22, 24, 26, 28]},
    "four blocks": {"model.config.cross_attention_layers": [16, 17, 20, 22]},
    "two blocks": {"model.config.cross_attention_layers": [16, 22]},
    "thirteen blocks": {"model.config.cross_attention_layers": list(range(16, 29))},
    "answers only": {"data.tasks": {"answer": 1.0}},
    "question tokens count": {"optimization.question_loss": 0.3},
    "passages renamed": {"data.renamed": 400},
    "four distractors": {"data.distractors": 4},
}


def recipe_of(row: str) -> Recipe:
    """The recipe of a row."""
    values = yaml.safe_load(RECIPE.read_text())
    values["name"] = f"ablation-{row.replace(' ', '-')}"
    for path, value in ROWS[row].items():
        *sections, name = path.split(".")
        section = values
        for key in sections:
            section = section[key]
        section[name] = value
    return recipe_from_dict(values)


def run(row: str, runs: Path, questions: int) -> dict[str, Any]:
    """Train a row, or what is missing of it, and measure it."""
    recipe = recipe_of(row)
    folder = runs / recipe.name
    finished = f"checkpoint-{recipe.optimization.steps:08d}"
    if any(path.name == finished for path in checkpoints(folder)):
        model = load_run(recipe, folder)
    else:
        model = run_recipe(recipe, folder, resume=(folder / "recipe.json").is_file())
    figures = quick_look(recipe, model, folder, questions)
    return {"row": row, "changes": ROWS[row], **figures}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of token F1, right and wrong context."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = [row["row"] for row in rows][::-1]
    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(rows) + 1.2))
    for name, offset, color in (("right_context", 0.2, "C0"), ("wrong_context", -0.2, "0.7")):
        values = [row["held_out"][name]["f1"] for row in rows][::-1]
        places = [index + offset for index in range(len(rows))]
        axes.barh(places, values, height=0.4, color=color, label=name.replace("_", " "))
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlabel="token F1, held-out questions")
    axes.legend()
    figure.tight_layout()
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)
    partial.replace(path)


def main() -> int:
    """Parse the command line; every finished row is written at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--results", type=Path, default=ROOT / "results/ablations.json")
    parser.add_argument("--questions", type=int, default=300, help="held-out questions a row is measured on")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    rows: list[dict[str, Any]] = []
    for row in arguments.rows:
        try:
            rows.append(run(row, arguments.runs, arguments.questions))
        except ValueError as error:
            print(f"error: {row}: {error}", file=sys.stderr)
            return 2
        write_result(arguments.results, {"rows": rows}, seed=0)
        plot(rows, arguments.results.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
