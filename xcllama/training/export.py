"""A finished run as a folder to publish, and the figures of its training."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from dataset_builders import NO_ANSWER
from modeling_xcllama.checkpoints import find_model
from modeling_xcllama.fingerprint import weights_digest
from xcllama.training.build import load_processor, parameter_counts
from xcllama.training.checkpoints import checkpoints, write_json
from xcllama.training.curve import write_curve
from xcllama.training.evaluation import answer_losses, read_held_out
from xcllama.training.examples import ExamplePlan
from xcllama.training.loop import read_log
from xcllama.training.objectives import Objective
from xcllama.training.passages import read_passages
from xcllama.training.prompts import Prompts
from xcllama.training.recipe import Recipe, recipe_from_dict
from xcllama.training.renaming import with_renamed
from xcllama.training.run import held_out_collator

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets")


def export_model(recipe: Recipe, model: nn.Module, run_folder: Path, target: Path) -> None:
    """Write the trained weights in 16 bits, config, chat template, recipe and curve to `target`."""
    target.mkdir(parents=True, exist_ok=True)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data = weight.data.to(torch.bfloat16)
    base_id = recipe.run.base_id or recipe.model.base
    if recipe.method == "cross_attention":
        model.config.base_model_name_or_path = base_id
        if recipe.model.encoder is not None:
            model.config.encoder_name_or_path = recipe.run.encoder_id or recipe.model.encoder
        declines = Prompts(load_processor(recipe)).answer_ids(NO_ANSWER) if recipe.data.unanswerable else [None]
        model.config.unanswerable_token_id = declines[0]
        model.save_cross_attention(target)
    else:
        model.peft_config["default"].base_model_name_or_path = base_id
        # embeddings are not trained: peft need not look the base up on the Hub to know
        model.save_pretrained(target, save_embedding_layers=False)
    # figures are measured after this: with the rounded weights, in the precision of the run
    for weight in trained:
        weight.data = weight.data.float()
    template = load_processor(recipe).tokenizer.chat_template
    if template:
        _write(target / "chat_template.jinja", template)
    _write(target / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))
    folders = stages(run_folder)
    write_curve([folder / "log.jsonl" for folder in folders], target, recipe.name)
    origin = Path(find_model(recipe.model.base)) / "SOURCE"
    write_json(
        target / "training.json",
        {
            "recipe": recipe.name,
            "digest": recipe.digest,
            "seed": recipe.seed,
            "step": _step(run_folder),
            "stages": [_stage(folder) for folder in folders],
            "base": recipe.model.base,
            "base_source": origin.read_text().strip() if origin.is_file() else recipe.model.base,
            "base_digest": _base_digest(recipe, model),
            "added_digest": model.added_digest() if recipe.method == "cross_attention" else None,
            "sources": sorted(recipe.data.sources),
            "versions": _versions(),
        },
    )


def _base_digest(recipe: Recipe, model: nn.Module) -> str:
    """Digest of the frozen decoder's weights, under the decoder's own names."""
    if recipe.method == "cross_attention":
        return model.base_digest()
    named = [(name.replace(".base_layer", ""), weight) for name, weight in model.get_base_model().named_parameters()]
    return weights_digest(((name, weight) for name, weight in named if ".lora_" not in name), sampled=True)


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


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text if text.endswith("\n") or path.suffix == ".jinja" else text + "\n")
    os.replace(temporary, path)
