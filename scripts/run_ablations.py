"""Train one short run a choice, all from one recipe, and tabulate what each costs or gives.

python scripts/run_ablations.py [--rows NAME...] [--runs runs/ablation] [--results results/ablations.json]

Rows that the results file holds are kept; one that was trained or evaluated before is not again, an interrupted one
goes on. Answers and losses are those of the SQuAD questions that choices may be made on (dev).
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from xcllama.durable import write_picture
from xcllama.evaluation.comparison import Models, Settings, compare
from xcllama.evaluation.tables import load_runs, summarize
from xcllama.provenance import provenance, require_clean, write_result
from xcllama.training.checkpoints import checkpoints
from xcllama.training.export import export_model, training_figures
from xcllama.training.recipe import Recipe, load_recipe, recipe_from_dict
from xcllama.training.run import load_run, run_recipe

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "squad_sample"
MEASURED = ("modeling_xcllama", "dataset_builders", "xcllama/training", "xcllama/evaluation")
RECIPE = ROOT / "xcllama/training/recipes/ablation.yaml"
# row -> what differs from the recipe
ROWS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "states of the last layer": {"model.config.context_layer": None},
    "states at three quarters": {"model.config.context_layer": 23},
    "states at a half": {"model.config.context_layer": 15},
    "states at a quarter": {"model.config.context_layer": 8},
    "projections random": {"model.init": "random", "model.least_squares_passages": 0},
    "projections copied": {"model.least_squares_passages": 0},
    "two blocks": {"model.config.cross_attention_layers": [16, 22]},
    "four blocks": {"model.config.cross_attention_layers": [16, 17, 20, 22]},
    "thirteen blocks": {"model.config.cross_attention_layers": list(range(16, 29))},
    "answers only": {"data.tasks": {"answer": 1.0}},
    "four distractors": {"data.distractors": 4},
    "every second layer": {"model.config.cross_attention_layers": [14, 16, 18, 20, 22, 24, 26, 28]},
    "question tokens count": {"optimization.question_loss": 0.3},
    "passages renamed": {"data.renamed": 100},
    "attention drawn to answers": {"optimization.span_loss": 0.3, "optimization.span_layers": [20, 21, 22, 23]},
}


def recipe_of(row: str) -> Recipe:
    """The recipe of a row."""
    values = load_recipe(RECIPE).to_dict()
    values["name"] = f"ablation-{row.replace(' ', '-')}"
    for path, value in ROWS[row].items():
        *sections, name = path.split(".")
        section = values
        for key in sections:
            section = section[key]
        section[name] = value
    return recipe_from_dict(values)


def measured(results: Path, limit: int) -> dict[str, dict[str, Any]]:
    """The rows of an earlier call whose recipe and number of questions are those of now, by name."""
    rows = json.loads(results.read_text())["rows"] if results.is_file() else []
    named = {row["row"]: row for row in rows if row["row"] in ROWS and row["answers"]["questions"] == limit}
    return {name: row for name, row in named.items() if row["digest"] == recipe_of(name).digest}


def run(row: str, runs: Path, limit: int) -> dict[str, Any]:
    """Train a row, or what is missing of it, and measure it.

    Raises:
        ValueError: it cannot be trained.
    """
    recipe = recipe_of(row)
    folder, exported = runs / recipe.name, runs / "checkpoints" / recipe.name
    finished = f"checkpoint-{recipe.optimization.steps:08d}"
    if any(path.name == finished for path in checkpoints(folder)):
        model = load_run(recipe, folder)
    else:
        model = run_recipe(recipe, folder, resume=(folder / "recipe.json").is_file())
    figures = training_figures(recipe, model, folder, questions=100)
    export_model(recipe, model, folder, exported)
    paths = compare(Models([str(exported)]), ["cross"], Settings(SOURCE, "dev", limit=limit), runs / "answers")
    (answered,) = summarize(load_runs(paths))["runs"]
    f1 = answered["quality"]["f1"]
    answers = {
        "source": SOURCE,
        "questions": limit,
        "f1": f1["value"],
        "interval": f1["interval"],
    }
    made = {"provenance": provenance(MEASURED, recipe.seed)}
    return {"row": row, "changes": ROWS[row], **figures, "answers": answers, **made}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of token F1 with its interval, and of the loss with the right and with a wrong context."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 0.4 * len(rows) + 1.2), sharey=True)
    places = range(len(rows))
    scores = [row["answers"]["f1"] for row in rows]
    bounds = [row["answers"]["interval"] for row in rows]
    errors = [[f1 - low for f1, (low, _) in zip(scores, bounds, strict=True)],
              [high - f1 for f1, (_, high) in zip(scores, bounds, strict=True)]]  # fmt: skip
    left.barh(places, scores, xerr=errors, color="C0", ecolor="0.4")
    left.set_yticks(places, [row["row"] for row in rows])
    left.invert_yaxis()
    left.set(xlabel=f"token F1, {rows[0]['answers']['questions']} questions of {SOURCE}")
    for name, color in (("right_context", "C0"), ("wrong_context", "0.7")):
        losses = [row["held_out"]["answer_loss"][name] for row in rows]
        right.plot(losses, places, "o", color=color, label=name.replace("_", " "))
    right.set(xlabel="loss of a held-out answer token")
    right.legend()
    figure.tight_layout()
    write_picture(path, figure)


def main() -> int:
    """Parse the command line; every finished row is written at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--results", type=Path, default=ROOT / "results/ablations.json")
    parser.add_argument("--limit", type=int, default=100, help="questions a row answers")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    require_clean(arguments.results)
    found = measured(arguments.results, arguments.limit)
    for name in arguments.rows:
        if name in found:
            continue
        try:
            found[name] = run(name, arguments.runs, arguments.limit)
        except ValueError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 2
        # with those of earlier calls: an interrupted call loses none
        rows = [found[row] for row in ROWS if row in found]
        write_result(arguments.results, {"rows": rows}, MEASURED, seed=0)
        plot(rows, arguments.results.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
