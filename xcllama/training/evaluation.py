"""Validation loss: held-out questions with the right and with a wrong context. Answers: `xcllama.evaluation`."""

import random
from dataclasses import dataclass

import torch

from dataset_builders import SOURCES, read_source
from xcllama.training.collator import Collator
from xcllama.training.examples import Example
from xcllama.training.prompts import Prompts


@dataclass(frozen=True)
class HeldOut:
    """Held-out questions: passage i belongs to question i.

    Args:
        passages: texts.
        context_ids: their token ids.
        questions: of each passage.
        answers: of each question, the first that is accepted.
    """

    passages: list[str]
    context_ids: list[list[int]]
    questions: list[str]
    answers: list[str]

    def examples(self, shift: int = 0) -> list[Example]:
        """The questions as examples; a `shift` gives each the passage of another question."""
        count = len(self.questions)
        texts = [self.passages[(index + shift) % count] for index in range(count)]
        if shift and any(text == own for text, own in zip(texts, self.passages, strict=True)):
            raise ValueError(f"`shift` ({shift}) leaves a question its own passage; use other questions.")
        return [
            Example(
                ((index + shift) % count,),
                (index + shift) % count,
                "answer",
                self.questions[index],
                self.answers[index],
                (),
                f"held-out:{index}",
            )
            for index in range(count)
        ]


def read_held_out(source: str, count: int, prompts: Prompts, max_words: int = 400) -> HeldOut:
    """`count` questions that a source holds for choices (dev, else test), each of another passage."""
    rows = {}
    for row in read_source(source, split="dev" if SOURCES[source].dev_documents else "test"):
        text = row["contexts_list"][0]
        if row["answerable"] and len(text.split()) <= max_words and not row["history"]:
            rows.setdefault(text, row)
    chosen = sorted(rows)
    random.Random(0).shuffle(chosen)
    chosen = chosen[:count]
    if len(chosen) < 2:
        raise ValueError(f"Source {source!r} has fewer than two short held-out passages; name another one.")
    return HeldOut(
        chosen,
        [prompts.context_ids(text) for text in chosen],
        [rows[text]["question"] for text in chosen],
        [rows[text]["answers"][0] for text in chosen],
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
