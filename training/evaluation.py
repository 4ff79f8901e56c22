"""A quick look at a model during and after training: held-out questions with the right and with a wrong context.

The published comparison is `lm_eval_tasks`; this one serves the loop.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch

from dataset_builders import read_source
from training.collator import Collator
from training.examples import Example
from training.metrics import exact_match, token_f1
from training.objectives import Objective
from training.prompts import Prompts


@dataclass(frozen=True)
class HeldOut:
    """Held-out questions: passage i belongs to question i.

    Args:
        passages: texts.
        context_ids: their token ids.
        questions: of each passage.
        answers: accepted answers of each question.
    """

    passages: list[str]
    context_ids: list[list[int]]
    questions: list[str]
    answers: list[list[str]]

    def examples(self, shift: int = 0) -> list[Example]:
        """The questions as examples; a `shift` gives each the passage of another question."""
        count = len(self.questions)
        texts = [self.passages[(index + shift) % count] for index in range(count)]
        if shift and any(text == own for text, own in zip(texts, self.passages, strict=True)):
            raise ValueError(f"`shift` ({shift}) leaves a question its own passage; use other questions.")
        return [
            Example(
                ((index + shift) % count,),
                "answer",
                self.questions[index],
                self.answers[index][0],
                (),
                f"held-out:{index}",
            )
            for index in range(count)
        ]


def read_held_out(source: str, count: int, prompts: Prompts, max_words: int = 400) -> HeldOut:
    """`count` questions of the test split of a source, each of another passage."""
    rows = {}
    for row in read_source(source, split="test"):
        text = row["contexts_list"][0]
        if row["answerable"] and len(text.split()) <= max_words and not row["history"]:
            rows.setdefault(text, row)
    chosen = sorted(rows)
    random.Random(0).shuffle(chosen)
    chosen = chosen[:count]
    if len(chosen) < 2:
        raise ValueError(f"Source {source!r} has fewer than two short passages in its test split; name another one.")
    return HeldOut(
        chosen,
        [prompts.context_ids(text) for text in chosen],
        [rows[text]["question"] for text in chosen],
        [rows[text]["answers"] for text in chosen],
    )


@torch.no_grad()
def answer_losses(
    objective: torch.nn.Module, held_out: HeldOut, collator: Collator, batch_size: int = 8
) -> dict[str, float]:
    """Mean loss of an answer token with the right and with a wrong context."""
    training = objective.training
    objective.eval()
    device = next(objective.parameters()).device
    figures = {}
    for name, shift in (("right_context", 0), ("wrong_context", 1)):
        total, tokens = 0.0, 0
        examples = held_out.examples(shift)
        for start in range(0, len(examples), batch_size):
            batch = collator(examples[start : start + batch_size])
            total += float(objective(batch.to(device)).answer)
            tokens += batch.num_targets
        figures[name] = total / tokens
    objective.train(training)
    return figures


@torch.no_grad()
def answer_questions(
    objective: Objective,
    held_out: HeldOut,
    collator: Collator,
    shift: int = 0,
    max_new_tokens: int = 16,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Greedy answers, their F1 and exact match, with the passage of the question `shift` places on."""
    model, prompts = objective.model, collator.prompts
    training = model.training
    model.eval()
    predictions: list[str] = []
    examples = held_out.examples(shift)
    for start in range(0, len(examples), batch_size):
        batch_examples = examples[start : start + batch_size]
        batch = collator(batch_examples).to(model.device)
        ids, mask = collator.generation_inputs(batch_examples)
        with objective.autocast():
            context = {"context_cache": objective.context(batch)} if objective.reads_context else {}
        with objective.autocast():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=prompts.end_token_id,
                pad_token_id=prompts.pad_token_id,
                **context,
            )
        predictions += [prompts.decode(row[ids.shape[1] :]) for row in output.tolist()]
    model.train(training)
    pairs = list(zip(predictions, held_out.answers, strict=True))
    return {
        "f1": sum(token_f1(*pair) for pair in pairs) / len(pairs),
        "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
        "predictions": predictions,
    }
