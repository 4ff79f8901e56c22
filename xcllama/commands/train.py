"""`xcllama train`: a recipe trained, exported and measured."""

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xcllama.durable import write_text
from xcllama.provenance import require_clean

if TYPE_CHECKING:
    from xcllama.training.recipe import Recipe

MEASURED = ("modeling_xcllama", "dataset_builders", "xcllama/training")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of a recipe of this project.")],
    run_folder: Annotated[Path | None, typer.Option(help="Checkpoints and log; default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print parameters, memory and steps.")] = False,
    no_training: Annotated[bool, typer.Option("--no-training", help="Export the newest checkpoint as it is.")] = False,
    export: Annotated[Path | None, typer.Option(help="Folder for weights, recipe, curve and card.")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder for the figures, with held-out losses.")] = None,
    questions: Annotated[int, typer.Option(help="Held-out questions of the figures.")] = 200,
) -> None:
    """Train a recipe. On several devices: `accelerate launch --num_processes 8 -m xcllama train RECIPE`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    from xcllama.training.recipe import load_recipe

    loaded = load_recipe(recipe)
    if dry_run:
        from xcllama.training.dry_run import plan

        typer.echo(json.dumps(plan(loaded), indent=2))
        return
    from xcllama.training.loop import DivergedError
    from xcllama.training.run import load_run, run_recipe

    require_clean(results)
    folder = run_folder or Path("runs") / loaded.name
    try:
        model = load_run(loaded, folder) if no_training else run_recipe(loaded, folder, resume)
    except DivergedError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(3) from error
    if int(os.environ.get("RANK", "0")) == 0:
        _write(loaded, model, folder, export, results, questions)


def _write(recipe: "Recipe", model, folder: Path, export: Path | None, results: Path | None, questions: int) -> None:
    """Export the model with its card, measure it, or both."""
    from xcllama.provenance import write_result
    from xcllama.publishing.model_card import readme
    from xcllama.training.export import export_model, training_figures

    if export:
        export_model(recipe, model, folder, export)
    if results:
        figures = training_figures(recipe, model, folder, questions)
        write_result(results / f"training_{recipe.name}.json", figures, MEASURED, recipe.seed)
    if export:
        write_text(export / "README.md", readme(export, results or Path("results")))
