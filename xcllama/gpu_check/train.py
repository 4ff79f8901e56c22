"""Training for the rest of the time, export whatever happened, and F1 on held-out questions."""

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling_xcllama import XCLlamaForCausalLM
from xcllama.gpu_check.answers import held_out_answers
from xcllama.gpu_check.options import MEASURED, Options, synchronize
from xcllama.gpu_check.tiny import tiny_pool, tiny_recipe
from xcllama.provenance import ROOT, write_result
from xcllama.training.build import build_model, load_processor, parameter_counts
from xcllama.training.folder import write_record, write_weights
from xcllama.training.objectives import Objective
from xcllama.training.recipe import Recipe, load_recipe
from xcllama.training.teacher import Teacher, load_prompt_reader, start_in_closed_form
from xcllama.training.timed import TimedRun, train_for
from xcllama.training.token_pool import PoolBatches, TokenPool

RECIPE = ROOT / "xcllama" / "training" / "recipes" / "xc-smollm2-135m-gpu.yaml"
# kept for the export and for the answers to the held-out questions; of these, for what comes after the answers
RESERVE_SECONDS, LAST_SECONDS = 40.0, 8.0
QUESTIONS = 300


class Interruption:
    """Whether this process was asked to end: the first signal asks, another one ends it."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


def check_train(options: Options) -> int:
    """Train, export to OUTPUT/checkpoint, answer; 0 if something was trained and no gradient ran away."""
    interruption = Interruption()
    recipe, pool = prepare(options)
    objective, batches, times = build(options, recipe, pool)
    log = options.output / "train_log.jsonl"
    log.unlink(missing_ok=True)
    seconds = options.left - (0 if options.dry_run else RESERVE_SECONDS)
    most = 1 if options.dry_run else None
    run = train_for(recipe, objective, batches, seconds, log, stopped=lambda: interruption.asked, max_steps=most)
    model, target = objective.model, options.output / "checkpoint"
    write_weights(recipe, model, target)
    stage = {"recipe": recipe.name, "digest": recipe.digest, "step": run.steps, "seconds": run.seconds}
    write_record(recipe, model, target, run.steps, [stage])
    figures = describe(recipe, objective, pool, run) | {"preparation_seconds": times}
    result = options.output / "train.json"
    # the weights and the curve are on disk before questions are asked
    write_result(result, figures | {"held_out": None}, MEASURED, recipe.seed)
    tokenizer = load_processor(recipe).tokenizer
    held_out = held_out_answers(
        model.to(torch.bfloat16),
        pool,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip(),
        options.deadline - LAST_SECONDS,
        QUESTIONS,
        max_new_tokens=3 if options.dry_run else 24,
    )
    write_result(result, figures | {"held_out": held_out}, MEASURED, recipe.seed)
    print(
        f"{run.questions} questions in {run.seconds:.0f} s; F1 {held_out['f1']} on {held_out['questions']}", flush=True
    )
    return 0 if run.steps and run.ended != "diverged" else 1


def prepare(options: Options) -> tuple[Recipe, TokenPool]:
    """The recipe and the tokens: the real ones where base and data were named, else tiny ones.

    Raises:
        ValueError: tokens of another tokenizer than the base's.
    """
    folder = options.decoder()
    if options.base is None:
        return tiny_recipe(folder), tiny_pool()
    recipe, pool = load_recipe(RECIPE), TokenPool.load(options.data)
    # recipes name their base, which is looked up in the cache folder
    cache = options.output / "models_cache"
    (cache / "models").mkdir(parents=True, exist_ok=True)
    link = cache / "models" / Path(recipe.model.base).name
    link.unlink(missing_ok=True)
    link.symlink_to(folder.resolve())
    os.environ["XCLLAMA_CACHE"] = str(cache)
    if pool.origin["vocabulary"] != len(load_processor(recipe).tokenizer):
        raise ValueError(f"the tokens in {options.data} are of another tokenizer than that in {options.base}.")
    if options.dry_run:
        few = dataclasses.replace(recipe.optimization, passages_per_step=2, questions_per_passage=2)
        start = dataclasses.replace(recipe.model, least_squares_passages=4)
        recipe, pool = dataclasses.replace(recipe, optimization=few, model=start), pool.first(8, held_out=2)
    return recipe, pool


def build(options: Options, recipe: Recipe, pool: TokenPool) -> tuple[Objective, PoolBatches, dict[str, float]]:
    """Model, teacher and states of all passages on the device, and the seconds that they took."""
    device, times, begin = options.device, {}, time.monotonic()
    model = build_model(recipe).to(device)
    model.config.cross_attn_implementation = options.implementation
    few = min(len(pool.passages), recipe.model.least_squares_passages)
    start_in_closed_form(recipe, model, [pool.passages[index].tolist() for index in range(few)])
    teacher = None
    if recipe.distilled:
        reader = load_prompt_reader(recipe, recipe.distillation.adapter).to(model.dtype)
        teacher = Teacher(reader, model.config.context_prefix).to(device)
        teacher.model.config.cross_attn_implementation = options.implementation
    synchronize(device)
    times["models"] = time.monotonic() - begin
    states = encode_passages(model, pool)
    synchronize(device)
    times["states"] = time.monotonic() - begin - times["models"]
    return Objective(model, recipe, teacher), PoolBatches(pool, recipe, states), times


@torch.no_grad()
def encode_passages(model: XCLlamaForCausalLM, pool: TokenPool) -> Tensor:
    """States of all passages, `[num_tokens, width]`."""
    ids = pool.passages.values.to(model.device)
    return model.eval().model.encode_packed(list(ids.split(pool.passages.lengths)))


def describe(recipe: Recipe, objective: Objective, pool: TokenPool, run: TimedRun) -> dict[str, Any]:
    """What was trained on what, how fast and how far."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "recipe": recipe.name,
        "digest": recipe.digest,
        "data": pool.origin,
        "parameters": parameter_counts(objective.model),
        "ended": run.ended,
        "seconds": run.seconds,
        "steps": run.steps,
        "questions": run.questions,
        "questions_per_second": run.questions / run.seconds if run.seconds else None,
        "forward_passes_per_step": run.parts,
        "peak_bytes": peak,
        "curve": run.curve,
    }
