"""Training for a given time on one device: the schedule follows the clock, what was learned is kept."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xcllama.training.batch import Batch
from xcllama.training.loop import learning_rate_factor, make_optimizer
from xcllama.training.objectives import Objective
from xcllama.training.recipe import Recipe
from xcllama.training.token_pool import PoolBatches

logger = logging.getLogger(__name__)

# parts of the time that the schedule knows
TICKS = 10_000
# updates in a row that are left out, as their gradients are not finite, before training ends
MOST_SKIPPED = 20


@dataclass
class TimedRun:
    """What a run did.

    Args:
        curve: a line every few seconds: seconds, step, questions, mean loss of an answer token, gradient norm.
        ended: "time", "stopped" from outside, or "diverged".
        parts: forward passes that a step was cut into, as memory allowed.
    """

    curve: list[dict[str, float]] = field(default_factory=list)
    ended: str = "time"
    parts: int = 1
    steps: int = 0
    questions: int = 0
    seconds: float = 0.0


def train_for(
    recipe: Recipe,
    objective: Objective,
    batches: PoolBatches,
    seconds: float,
    log: Path,
    log_seconds: float = 10.0,
    stopped: Callable[[], bool] = lambda: False,
    max_steps: int | None = None,
) -> TimedRun:
    """Train `objective` for `seconds`, the length of its longest step included, or until `stopped`.

    Args:
        log: JSON Lines, a line every `log_seconds`.
        max_steps: end after so many, in the middle of the schedule.

    Returns:
        What was done. The model holds the last weights whose gradients were finite.
    """
    run, trainer = TimedRun(), _Trainer(recipe, objective)
    run.parts = recipe.optimization.accumulate
    begin = last = time.monotonic()
    longest, losses, tokens = 0.0, 0.0, 0
    while True:
        started = time.monotonic()
        elapsed = started - begin
        if stopped() or elapsed + longest > seconds or run.steps == max_steps or trainer.skipped >= MOST_SKIPPED:
            break
        trainer.set_rate(elapsed / max(seconds, elapsed + 1e-6))
        loss, count, questions = _step(trainer, batches, run)
        run.steps, run.questions = run.steps + 1, run.questions + questions
        losses, tokens = losses + loss, tokens + count
        now = time.monotonic()
        # the first step compiles the kernels
        longest = max(longest, now - started) if run.steps > 1 else 0.0
        if now - last >= log_seconds or run.steps == 1:
            run.curve.append(_line(run, trainer, now - begin, losses / max(1, tokens), log))
            last, losses, tokens = now, 0.0, 0
    run.seconds = time.monotonic() - begin
    if tokens:
        run.curve.append(_line(run, trainer, run.seconds, losses / tokens, log))
    if trainer.skipped >= MOST_SKIPPED:
        run.ended = "diverged"
        trainer.restore()
    elif stopped():
        run.ended = "stopped"
    return run


class _Trainer:
    """The optimizer of an objective, and a copy of its last good weights."""

    def __init__(self, recipe: Recipe, objective: Objective):
        self.objective, self.max_norm = objective, recipe.optimization.max_grad_norm
        self.schedule = dataclasses.replace(recipe.optimization, steps=TICKS)
        self.optimizer = make_optimizer(objective, recipe.optimization)
        self.weights = [weight for weight in objective.parameters() if weight.requires_grad]
        self.good = [weight.detach().clone() for weight in self.weights]
        self.skipped, self.norm = 0, 0.0

    def set_rate(self, progress: float) -> None:
        """Give the optimizer the learning rate of a share of the time."""
        self.factor = learning_rate_factor(min(TICKS - 1, int(progress * TICKS)), self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.factor

    def update(self, batches: list[Batch]) -> tuple[float, int]:
        """Loss of the answer tokens, and their number; no update where the gradient is not finite."""
        count = sum(batch.num_targets for batch in batches)
        total: Tensor | float = 0.0
        self.objective.train()
        for batch in batches:
            losses = self.objective(batch)
            (losses.objective / count).backward()
            total = total + losses.answer.detach()
        norm = nn.utils.clip_grad_norm_(self.weights, self.max_norm)
        self.norm = float(norm)
        if norm.isfinite():
            self.optimizer.step()
            self.skipped = 0
        else:
            self.skipped += 1
        self.optimizer.zero_grad()
        return float(total), count

    def keep(self) -> None:
        """Remember the weights, if the last gradients were finite."""
        if not self.skipped:
            torch._foreach_copy_(self.good, [weight.detach() for weight in self.weights])

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the weights that were kept."""
        torch._foreach_copy_(self.weights, self.good)


def _step(trainer: _Trainer, batches: PoolBatches, run: TimedRun) -> tuple[float, int, int]:
    """Loss, answer tokens and questions of the next step, cut into more parts where the device's memory needs it."""
    while True:
        parts = batches.step(run.steps, run.parts)
        try:
            return *trainer.update(parts), sum(len(part.rows) for part in parts)
        except torch.OutOfMemoryError:
            if run.parts >= batches.recipe.optimization.passages_per_step:
                raise
        # outside of the handler: the error holds the frames, and these the tensors, that did not fit
        run.parts *= 2
        trainer.optimizer.zero_grad()
        torch.cuda.empty_cache()
        logger.info("out of memory: steps are cut into %d parts", run.parts)


def _line(run: TimedRun, trainer: _Trainer, seconds: float, loss: float, log: Path) -> dict[str, Any]:
    trainer.keep()
    line = {
        "seconds": round(seconds, 2),
        "step": run.steps,
        "questions": run.questions,
        "loss": loss,
        "gradient_norm": trainer.norm,
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
    }
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")
    logger.info("%s", line)
    return line
