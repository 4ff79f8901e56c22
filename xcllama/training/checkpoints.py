"""Checkpoints of a run: trained weights, optimizer state and step, in safetensors and JSON, complete or absent.

RUN/recipe.json                     what the run computes; another recipe may not write here
RUN/log.jsonl                       one line a logged step
RUN/checkpoint-00000200/            weights.safetensors, optimizer.safetensors, state.json

accelerate's `save_state` would pickle the optimizer and write the frozen base each time.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from xcllama.durable import write_json
from xcllama.training.recipe import Recipe, recipe_from_dict

# the main process alone gets what is written; every process gets what it compares with
_SAVE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_COMPARE = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
_LOAD = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


def open_run(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Claim `folder` for a recipe.

    Raises:
        ValueError: it holds a run and `resume` is false, a run of another recipe, or nothing to resume.
    """
    path = folder / "recipe.json"
    if path.is_file():
        other = json.loads(path.read_text())
        # read anew: a field that recipes got since then has its default
        if recipe_from_dict(other["recipe"]).digest != recipe.digest:
            raise ValueError(
                f"{folder} holds a run of recipe {other['recipe']['name']!r} ({other['digest']}), not of "
                f"{recipe.name!r} ({recipe.digest}); give another --run-folder. Nothing was overwritten."
            )
        if not resume:
            raise ValueError(
                f"{folder} holds a run of this recipe already; add --resume, or give another --run-folder."
            )
        return
    if resume:
        raise ValueError(f"{folder} holds no run to resume; leave --resume out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"digest": recipe.digest, "recipe": recipe.to_dict()})


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*") if (path / "state.json").is_file())


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int, is_main: bool
) -> None:
    """Write the checkpoint after `step` updates and remove all but the newest `keep`; every process must call it."""
    weights = _trained(model, get_model_state_dict(model, options=_SAVE))
    states = get_optimizer_state_dict(model, optimizer, options=_SAVE).get("state", {})
    if not is_main:
        return
    target = folder / f"checkpoint-{step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(_contiguous(weights), temporary / "weights.safetensors")
    flat = {f"{name}|{key}": torch.as_tensor(value) for name, state in states.items() for key, value in state.items()}
    save_file(_contiguous(flat), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, "weights": len(weights)}) + "\n")
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Load the newest checkpoint of a run and return its step, 0 when there is none.

    Raises:
        ValueError: the checkpoint is damaged or does not fit the model.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    path = found[-1]
    try:
        weights = _trained(model, load_file(path / "weights.safetensors"))
        step = json.loads((path / "state.json").read_text())["step"]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it to resume from the one before.") from None
    wanted = _trained(model, get_model_state_dict(model, options=_COMPARE))
    wanted = {name: tensor.shape for name, tensor in wanted.items()}
    if wanted != {name: tensor.shape for name, tensor in weights.items()}:
        different = sorted(set(wanted) ^ set(weights)) or [
            name for name in wanted if wanted[name] != weights[name].shape
        ]
        raise ValueError(f"{path} does not fit the model: {different[0]!r} is missing or has another shape.")
    set_model_state_dict(model, weights, options=_LOAD)
    if optimizer is not None:
        flat = load_file(path / "optimizer.safetensors")
        states: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in flat.items():
            parameter, key = name.rsplit("|", 1)
            states.setdefault(parameter, {})[key] = tensor
        groups = get_optimizer_state_dict(model, optimizer, options=_COMPARE)["param_groups"]
        set_optimizer_state_dict(model, optimizer, {"state": states, "param_groups": groups}, options=_LOAD)
    return step


def _trained(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the frozen weights that have a second name (a tied head), which the options above let through."""
    frozen = {id(weight) for weight in model.parameters() if not weight.requires_grad}
    names = {
        name.removeprefix("module.")
        for name, weight in model.named_parameters(remove_duplicate=False)
        if id(weight) in frozen
    }
    return {name: tensor for name, tensor in weights.items() if name not in names}


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
