"""From a recipe's sources to a `TokenPool`: every question they have, and some that are made of any passage."""

import random
from collections.abc import Iterator
from itertools import islice

import torch

from dataset_builders import read_source
from xcllama.training.build import load_processor
from xcllama.training.examples import Example, ExamplePlan
from xcllama.training.passages import read_passages
from xcllama.training.prompts import Prompts
from xcllama.training.recipe import Recipe
from xcllama.training.renaming import with_renamed
from xcllama.training.token_pool import Ragged, TokenPool

# groups of questions that are made of passages, over all tasks
LABEL_FREE_GROUPS = 12_000


def make_pool(recipe: Recipe, held_out: int, label_free_groups: int = LABEL_FREE_GROUPS) -> TokenPool:
    """Read and tokenize what a recipe draws from, and `held_out` questions of its `evaluate_source`.

    Raises:
        ValueError: see `read_passages`.
    """
    prompts = Prompts(load_processor(recipe))
    passages = with_renamed(read_passages(recipe.data, recipe.seed), recipe.data.renamed, recipe.seed)
    groups = list(_groups(ExamplePlan(passages, recipe), label_free_groups))
    examples = [example for _, group in groups for example in group]
    encoded = [prompts.prompt_ids(example.question, example.history) for example in examples]
    rows = read_source(recipe.run.evaluate_source, split="dev")
    held = list(islice((row for row in rows if row["answerable"]), held_out))
    sizes = [0, *(len(group) for _, group in groups)]
    read, own = [group[0].passages[0] for _, group in groups], [group[0].own for _, group in groups]
    used = {passage: place for place, passage in enumerate(dict.fromkeys(read + own))}
    return TokenPool(
        passages=Ragged.of(prompts.context_ids(passages[index].text) for index in used),
        prompts=Ragged.of(ids for ids, _ in encoded),
        answers=Ragged.of(prompts.answer_ids(example.answer) for example in examples),
        questions=torch.tensor([(where.start, where.stop) for _, where in encoded]),
        group_passages=torch.tensor([used[index] for index in read]),
        group_own=torch.tensor([used[index] for index in own]),
        group_offsets=torch.tensor(sizes).cumsum(0),
        weights=torch.tensor([weight for weight, _ in groups]),
        held_passages=Ragged.of(prompts.context_ids(row["contexts_list"][0]) for row in held),
        held_prompts=Ragged.of(prompts.prompt_ids(row["question"])[0] for row in held),
        held_answers=[list(row["answers"]) for row in held],
        pad_token_id=prompts.pad_token_id,
        origin={
            "recipe": recipe.name,
            "digest": recipe.digest,
            "sources": sorted(recipe.data.sources),
            "held_out": recipe.run.evaluate_source,
            "vocabulary": len(prompts.tokenizer),
            "passages": len(used),
            "examples": len(examples),
        },
    )


def _groups(plan: ExamplePlan, label_free_groups: int) -> Iterator[tuple[float, list[Example]]]:
    """Groups of examples with the share of each in what `plan` draws."""
    recipe = plan.recipe
    tasks = {task: weight / sum(recipe.data.tasks.values()) for task, weight in recipe.data.tasks.items() if weight}
    sources = sum(plan.source_weights.values())
    for source, weight in plan.source_weights.items() if "answer" in tasks else ():
        asked = plan.asked[source]
        share = tasks["answer"] * weight / sources / len(asked)
        for index in asked:
            everything = len(plan.passages[index].questions)
            yield share, plan.examples(f"answer:{source}", index, f"pool:{source}:{index}", everything)
    generator = random.Random(f"{recipe.seed}:pool")
    label_free, size = [task for task in tasks if task != "answer"], recipe.optimization.questions_per_passage
    for task in label_free:
        count = min(len(plan.passages), label_free_groups // len(label_free))
        for index in generator.sample(range(len(plan.passages)), count):
            if found := plan.examples(task, index, f"pool:{task}:{index}", size):
                yield tasks[task] / count, found
