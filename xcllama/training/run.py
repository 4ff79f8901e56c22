"""From a recipe to a trained, exported model: what `xcllama train` does."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from dataset_builders.wheels import cache_folder
from xcllama.models import load_model
from xcllama.training.batch import Batch
from xcllama.training.build import build_model, load_processor, parameter_counts
from xcllama.training.checkpoints import load_checkpoint, open_run
from xcllama.training.collator import Collator
from xcllama.training.evaluation import HeldOut, answer_losses, read_held_out
from xcllama.training.examples import Example, ExamplePlan
from xcllama.training.following import follow
from xcllama.training.loop import Setup, make_accelerator, train
from xcllama.training.objectives import Objective
from xcllama.training.passages import read_passages
from xcllama.training.prompts import Prompts
from xcllama.training.recipe import Recipe
from xcllama.training.renaming import with_renamed
from xcllama.training.stored_states import encode_in_memory, store_states
from xcllama.training.teacher import Teacher, load_prompt_reader, start_in_closed_form
from xcllama.training.transfer import transfer

logger = logging.getLogger(__name__)


def run_recipe(recipe: Recipe, folder: Path, resume: bool = False) -> nn.Module:
    """Train a recipe in `folder`, or go on with `resume`; returns the trained model.

    Raises:
        ValueError: see `train`, `read_passages`, `build_model`.
        DivergedError: the loss is not finite.
    """
    set_seed(recipe.seed)
    accelerator = make_accelerator(recipe, folder)
    prompts = Prompts(load_processor(recipe))
    logger.info("%s: reading the passages", recipe.name)
    passages = with_renamed(read_passages(recipe.data, recipe.seed), recipe.data.renamed, recipe.seed)
    context_ids = [prompts.context_ids(passage.text) for passage in passages]
    model = build_model(recipe)
    counts = parameter_counts(model)
    logger.info("%d passages; %d trained and %d frozen weights", len(passages), counts["trained"], counts["frozen"])
    if recipe.model.least_squares_passages and not resume:
        _start(recipe, model, prompts, [passage.text for passage in passages])
    objective = Objective(model, recipe, _teacher(recipe, model, accelerator))
    if recipe.model.start_from is not None and not load_checkpoint(Path(recipe.model.start_from), objective):
        raise ValueError(
            f"`model.start_from` ({recipe.model.start_from}) holds no checkpoint; train that stage first."
        )
    states = _stored(recipe, model, context_ids, accelerator)
    collator = make_collator(recipe, prompts, [passage.text for passage in passages], context_ids, states)
    plan = ExamplePlan(passages, recipe)
    setup = Setup(objective, batches_of(plan, collator, accelerator, recipe), _evaluator(recipe, prompts, model))
    train(recipe, folder, setup, accelerator, resume)
    _mix_start(recipe, objective)
    return model


def _start(recipe: Recipe, model: nn.Module, prompts: Prompts, texts: list[str]) -> None:
    """Set the added weights in closed form, from the decoder or from a trained model, before the first step."""
    section = recipe.model
    few = texts[: section.least_squares_passages]
    if section.transfer_from is None:
        start_in_closed_form(recipe, model, [prompts.context_ids(text) for text in few])
        return
    source, target = load_model(section.transfer_from, dtype=model.dtype), (model, prompts.processor)
    transfer(source, target, few)
    if section.follow_steps:
        follow(source, target, texts, section.follow_steps, states_folder(), recipe.seed)


def load_run(recipe: Recipe, folder: Path) -> nn.Module:
    """The model of a run as its newest checkpoint has it, finished or not, with the share of its start.

    Raises:
        ValueError: no checkpoint, or a run of another recipe.
    """
    open_run(folder, recipe, resume=True)
    model = build_model(recipe)
    objective = Objective(model, recipe)
    if not load_checkpoint(folder, objective):
        raise ValueError(f"{folder} holds no checkpoint yet; train first.")
    _mix_start(recipe, objective)
    return model


@torch.no_grad()
def _mix_start(recipe: Recipe, objective: nn.Module) -> None:
    """Give the weights that a run started from their share; its checkpoints stay as they were trained."""
    share = recipe.optimization.start_share
    if not share:
        return
    weights = [weight for weight in objective.parameters() if weight.requires_grad]
    trained = [weight.clone() for weight in weights]
    if not load_checkpoint(Path(recipe.model.start_from), objective):
        raise ValueError(f"`model.start_from` ({recipe.model.start_from}) has no checkpoint for `start_share`.")
    for weight, own in zip(weights, trained, strict=True):
        weight.lerp_(own, 1 - share)


def make_collator(
    recipe: Recipe,
    prompts: Prompts,
    passages: list[str],
    context_ids: list[list[int]],
    states: Sequence[Tensor] | None,
    training: bool = True,
) -> Collator:
    """The collator of a recipe; without dropout of context tokens when not `training`."""
    return Collator(
        prompts,
        passages,
        context_ids,
        states,
        in_prompt=recipe.method == "lora_prompt",
        context_dropout=recipe.optimization.context_dropout if training else 0.0,
        spans=training and recipe.optimization.span_loss > 0,
    )


def batches_of(
    plan: ExamplePlan, collator: Collator, accelerator: Accelerator, recipe: Recipe
) -> Callable[[int], list[Batch]]:
    """Step -> this process's micro-batches: an equal share of the step's passages, in order."""
    parts = recipe.optimization.accumulate

    def batches(step: int) -> list[Batch]:
        groups = plan.step(step)
        size = len(groups) // (accelerator.num_processes * parts)
        first = accelerator.process_index * parts
        found: list[list[Example]] = [
            [example for group in groups[part * size : (part + 1) * size] for example in group]
            for part in range(first, first + parts)
        ]
        return [collator(examples) for examples in found]

    return batches


def states_folder() -> Path:
    """Where states of passages are kept between runs."""
    return cache_folder() / "training_states"


def reads_stored_states(recipe: Recipe) -> bool:
    """Whether the encoder is frozen, so that its states can be computed once."""
    return recipe.method == "cross_attention" and not recipe.model.train_encoder


def _stored(
    recipe: Recipe, model: nn.Module, context_ids: list[list[int]], accelerator: Accelerator
) -> Sequence[Tensor] | None:
    if not reads_stored_states(recipe) or not recipe.run.store_states:
        return None
    model.to(accelerator.device)
    with accelerator.main_process_first():
        return store_states(model, context_ids, states_folder(), accelerator.is_main_process)


def _evaluator(recipe: Recipe, prompts: Prompts, model: nn.Module) -> Callable[[nn.Module], dict[str, float]] | None:
    if not recipe.run.evaluate_steps:
        return None
    held_out: HeldOut = read_held_out(recipe.run.evaluate_source, recipe.run.evaluate_questions, prompts)
    collator: list[Collator] = []

    def evaluate(objective: nn.Module) -> dict[str, float]:
        if not collator:
            collator.append(held_out_collator(recipe, prompts, model, held_out))
        return answer_losses(objective, held_out, collator[0])

    return evaluate


def held_out_collator(recipe: Recipe, prompts: Prompts, model: nn.Module, held_out: HeldOut) -> Collator:
    """A collator over held-out passages; their states are computed in memory where they are not trained."""
    states = None
    if reads_stored_states(recipe):
        states = encode_in_memory(model, held_out.context_ids)
    return make_collator(recipe, prompts, held_out.passages, held_out.context_ids, states, training=False)


def _teacher(recipe: Recipe, model: nn.Module, accelerator: Accelerator) -> Teacher | None:
    if not recipe.distilled:
        return None
    reader = load_prompt_reader(recipe, recipe.distillation.adapter)
    return Teacher(reader, model.config.context_prefix).to(accelerator.device)
