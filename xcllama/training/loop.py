"""The training loop: one recipe, one run folder, any number of processes (`accelerate launch`)."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from xcllama.durable import write_text
from xcllama.training.batch import Batch
from xcllama.training.checkpoints import load_checkpoint, open_run, save_checkpoint
from xcllama.training.recipe import OptimizationSection, Recipe

logger = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """A loss or gradient that is not finite; the last checkpoint is untouched."""


@dataclass
class Setup:
    """What a loop needs besides the recipe.

    Args:
        objective: module whose forward takes a `Batch` and returns its `Losses`; holds the model.
        batches: step -> the micro-batches of this process.
        evaluate: called with the prepared objective, gives figures to log (None: nothing to evaluate).
    """

    objective: nn.Module
    batches: Callable[[int], list[Batch]]
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """The accelerator that a recipe asks for; its processes must divide the passages of a step."""
    trackers = list(recipe.run.trackers)
    # the objective sets its own precision
    accelerator = Accelerator(mixed_precision="no", log_with=trackers or None, project_dir=folder)
    parts = accelerator.num_processes * recipe.optimization.accumulate
    if recipe.optimization.passages_per_step % parts:
        raise ValueError(
            f"`optimization.passages_per_step` ({recipe.optimization.passages_per_step}) must be a multiple of "
            f"processes x accumulate = {accelerator.num_processes} x {recipe.optimization.accumulate}."
        )
    if trackers:
        accelerator.init_trackers(recipe.name, config={"digest": recipe.digest})
    return accelerator


def learning_rate_factor(step: int, optimization: OptimizationSection) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then the schedule down to 0 at the end.

    A function, not one of transformers' schedules, which count: a resumed run is where it was, a timed one anywhere.
    """
    warmup = max(1, round(optimization.warmup * optimization.steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, optimization.steps - warmup)
    if optimization.schedule == "linear":
        return 1 - progress
    return 1.0 if optimization.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, optimization: OptimizationSection) -> torch.optim.AdamW:
    """AdamW over the trained weights, the gates in a group of their own.

    Raises:
        ValueError: nothing is trained.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not trained:
        raise ValueError("The recipe leaves no weight to train; see `method`, `model.config` and `model.lora`.")
    gates = [weight for name, weight in trained.items() if name.endswith("gate")]
    others = [weight for name, weight in trained.items() if not name.endswith("gate")]
    gate_rate = optimization.gate_learning_rate or optimization.learning_rate
    groups = [{"params": others, "peak": optimization.learning_rate, "weight_decay": optimization.weight_decay}]
    if gates:
        groups.append({"params": gates, "peak": gate_rate, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=optimization.learning_rate, betas=tuple(optimization.betas))


def train(recipe: Recipe, folder: Path, setup: Setup, accelerator: Accelerator, resume: bool = False) -> None:
    """Train until the recipe's last step, or from the newest checkpoint of `folder` with `resume`.

    Raises:
        ValueError: the folder holds another run, or nothing is trained.
        DivergedError: the loss or the gradient is not finite; names the step and its examples.
    """
    optimization = recipe.optimization
    optimizer = make_optimizer(setup.objective, optimization)
    if accelerator.is_main_process:
        open_run(folder, recipe, resume)
    accelerator.wait_for_everyone()
    objective, optimizer = accelerator.prepare(setup.objective, optimizer)
    start = load_checkpoint(folder, objective, optimizer.optimizer) if resume else 0
    log = RunLog(folder, start, accelerator)
    last = min(optimization.steps, recipe.run.stop_step or optimization.steps)
    for step in range(start, last):
        factor = learning_rate_factor(step, optimization)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        loss, tokens, norm = _update(step, setup, objective, optimizer, accelerator, optimization)
        done = step + 1
        log.add(loss, tokens)
        if done % recipe.run.log_steps == 0 or done == last:
            log.write(done, {"learning_rate": optimization.learning_rate * factor, "gradient_norm": norm})
        if done % recipe.run.save_steps == 0 or done == last:
            raw = optimizer.optimizer
            save_checkpoint(folder, done, objective, raw, recipe.run.keep, accelerator.is_main_process)
            accelerator.wait_for_everyone()
        if setup.evaluate and recipe.run.evaluate_steps and done % recipe.run.evaluate_steps == 0:
            log.write(done, setup.evaluate(objective))
    accelerator.end_training()


def _update(step, setup, objective, optimizer, accelerator, optimization) -> tuple[float, int, float]:
    """One step: (mean loss of the answer tokens over all processes, their number, gradient norm before clipping)."""
    batches = setup.batches(step)
    count = torch.tensor(float(sum(batch.num_targets for batch in batches)), device=accelerator.device)
    count = accelerator.reduce(count, "sum").clamp(min=1)
    total = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with _maybe_no_sync(accelerator, objective, last):
            losses = objective(batch.to(accelerator.device))
            _check(losses.objective, step, batch, what="loss")
            # gradients are averaged over processes, the loss is a sum over tokens
            accelerator.backward(losses.objective * (accelerator.num_processes / count))
        total += losses.answer.detach()
    norm = accelerator.clip_grad_norm_(
        (p for p in objective.parameters() if p.requires_grad), optimization.max_grad_norm
    )
    _check(norm, step, batches[0], what="gradient norm")
    optimizer.step()
    optimizer.zero_grad()
    total = accelerator.reduce(total, "sum") / count
    return total.item(), int(count.item()), float(norm)


def _maybe_no_sync(accelerator: Accelerator, objective: nn.Module, last: bool):
    return contextlib.nullcontext() if last else accelerator.no_sync(objective)


def _check(value: torch.Tensor, step: int, batch: Batch, what: str) -> None:
    value = torch.as_tensor(value).detach()
    if not value.isfinite().all():
        raise DivergedError(
            f"The {what} of step {step + 1} is {float(value)}. Examples: {', '.join(batch.keys)}. "
            "The last checkpoint is kept; lower `optimization.learning_rate` or look at these examples."
        )


class RunLog:
    """Means over the steps since the last line, to log.jsonl and the trackers; a resumed run drops later lines."""

    def __init__(self, folder: Path, start: int, accelerator: Accelerator):
        self.path, self.accelerator = folder / "log.jsonl", accelerator
        self.losses: list[float] = []
        self.tokens, self.time = 0, time.perf_counter()
        self.elapsed = 0.0
        if accelerator.is_main_process and self.path.is_file():
            kept = [line for line in read_log(self.path) if line["step"] <= start]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self.elapsed = max((line.get("seconds", 0.0) for line in kept), default=0.0)

    def add(self, loss: float, tokens: int) -> None:
        """Note one step."""
        self.losses.append(loss)
        self.tokens += tokens

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Write a line: the figures, and the mean loss since the last line where there is one."""
        now = time.perf_counter()
        line: dict[str, float] = {"step": step}
        if self.losses:
            passed = now - self.time
            self.elapsed += passed
            line["loss"] = sum(self.losses) / len(self.losses)
            line["seconds_per_step"] = passed / len(self.losses)
            line["target_tokens"] = self.tokens
            self.losses, self.tokens = [], 0
        line |= figures | {"seconds": self.elapsed}
        self.time = time.perf_counter()
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            logger.info(json.dumps({key: round(value, 4) for key, value in line.items()}))
        self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=step)


def read_log(path: Path) -> Iterator[dict[str, float]]:
    """The lines of a log; a last line that a killed process left half written is skipped."""
    for text in path.read_text().splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            return
