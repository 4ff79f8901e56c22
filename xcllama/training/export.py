"""A finished run as a folder to publish, and the figures of its training."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from modeling_xcllama.modeling_xcllama import WEIGHTS_NAME
from xcllama.durable import write_json
from xcllama.training.build import load_processor, parameter_counts
from xcllama.training.checkpoints import checkpoints
from xcllama.training.curve import write_curve
from xcllama.training.evaluation import answer_losses, read_held_out
from xcllama.training.examples import ExamplePlan
from xcllama.training.folder import write_record, write_weights
from xcllama.training.loop import read_log
from xcllama.training.objectives import Objective
from xcllama.training.passages import read_passages
from xcllama.training.prompts import Prompts
from xcllama.training.recipe import Recipe, recipe_from_dict
from xcllama.training.renaming import with_renamed
from xcllama.training.run import held_out_collator


def export_model(recipe: Recipe, model: nn.Module, run_folder: Path, target: Path) -> None:
    """Write the trained weights, see `write_weights`, their curve and record to `target`.

    An `answer_threshold` that `target` has already stays where the weights are the same: it was fitted to their
    scores. Other weights have none until `xcllama eval compare --store-threshold` fits one.
    """
    weights, config = target / WEIGHTS_NAME, target / "config.json"
    before = weights.read_bytes() if weights.is_file() else None
    threshold = json.loads(config.read_text()).get("answer_threshold") if before is not None else None
    write_weights(recipe, model, target)
    if threshold is not None and weights.read_bytes() == before:
        write_json(config, json.loads(config.read_text()) | {"answer_threshold": threshold})
    folders = stages(run_folder)
    write_curve([folder / "log.jsonl" for folder in folders], target, recipe.name)
    write_record(recipe, model, target, _step(run_folder), [_stage(folder) for folder in folders])


def training_figures(recipe: Recipe, model: nn.Module, run_folder: Path, questions: int) -> dict[str, Any]:
    """Figures of a run, and the loss of held-out answers with the right and with a wrong context."""
    prompts = Prompts(load_processor(recipe))
    held_out = read_held_out(recipe.run.evaluate_source, questions, prompts)
    losses = answer_losses(Objective(model, recipe), held_out, held_out_collator(recipe, prompts, model, held_out))
    lines = list(read_log(run_folder / "log.jsonl"))
    trained = [_stage(folder) for folder in stages(run_folder)]
    return {
        "recipe": recipe.name,
        "digest": recipe.digest,
        "parameters": parameter_counts(model),
        "step": _step(run_folder),
        "stages": trained,
        "training_seconds": sum(stage["seconds"] for stage in trained),
        "final_loss": next((line["loss"] for line in reversed(lines) if "loss" in line), None),
        "held_out": {
            "source": recipe.run.evaluate_source,
            "questions": len(held_out.questions),
            "answer_loss": losses,
        },
    }


def stages(run_folder: Path) -> list[Path]:
    """The run folders that a run went through, first to last."""
    start = json.loads((run_folder / "recipe.json").read_text())["recipe"]["model"].get("start_from")
    return [*(stages(Path(start)) if start is not None else []), run_folder]


def _stage(folder: Path) -> dict[str, Any]:
    recipe = json.loads((folder / "recipe.json").read_text())
    seconds = max((line.get("seconds", 0.0) for line in read_log(folder / "log.jsonl")), default=0.0)
    named = {"recipe": recipe["recipe"]["name"], "digest": recipe["digest"], "step": _step(folder)}
    return named | {"questions": questions_seen(recipe_from_dict(recipe["recipe"]), _step(folder)), "seconds": seconds}


def questions_seen(recipe: Recipe, steps: int) -> int:
    """Questions of the first `steps` steps of a recipe: they depend on nothing else, so they are drawn again."""
    passages = with_renamed(read_passages(recipe.data, recipe.seed), recipe.data.renamed, recipe.seed)
    plan = ExamplePlan(passages, recipe)
    return sum(len(group) for step in range(steps) for group in plan.step(step))


def _step(run_folder: Path) -> int:
    found = checkpoints(run_folder)
    if not found:
        raise ValueError(f"{run_folder} holds no checkpoint to export; train first.")
    return json.loads((found[-1] / "state.json").read_text())["step"]
