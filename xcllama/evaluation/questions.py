"""Questions of a source, and the texts that a method reads for each: its own, others beside them, or another's."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dataset_builders import SOURCES, SourceError, document_key, read_source
from dataset_builders.splits import holds, normalize
from xcllama.evaluation.documents import place

PASSAGES = ("right", "other", "absent")


@dataclass(frozen=True)
class Question:
    """A question and what answers it.

    Args:
        id: unique in its source.
        document: the article (or text) that it is asked about.
        history: earlier (question, answer) turns.
        answers: what is accepted, the reference first.
        contexts: the texts that answer it.
        absent: another passage of the same article, that does not answer it; None: there is none.
    """

    id: str
    document: str
    question: str
    history: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]
    contexts: tuple[str, ...]
    absent: str | None


def has_absent(source: str) -> bool:
    """Whether the questions of a source are also asked on passages that do not answer them."""
    return f"{source}_absent" in SOURCES


def read_questions(source: str, split: str, path: str | None = None) -> list[Question]:
    """The questions of a split, in an order that is random and always the same.

    Raises:
        ValueError: the data cannot be read, or has no question.
    """
    try:
        rows = [row for row in read_source(source, path, split) if row["question"]]
        others = read_source(f"{source}_absent", path, split) if has_absent(source) else ()
        absent = {row["sample_idx"]: row["contexts_list"][0] for row in others}
    except (SourceError, RuntimeError, OSError) as error:
        raise ValueError(f"the data of {source!r} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if not rows:
        raise ValueError(f"the {split} split of {source!r} has no questions; name another one.")
    return [
        Question(
            row["sample_idx"],
            document_key(row),
            row["question"],
            tuple((turn["question"], turn["answer"]) for turn in row["history"]),
            tuple(row["answers"]),
            tuple(row["contexts_list"]),
            absent.get(row["sample_idx"]),
        )
        for row in sorted(rows, key=place)
    ]


class Shelf:
    """All texts of a split, from which each question gets those that it is asked on.

    Args:
        questions: of the split, all of them: what is drawn does not depend on how many are asked.
        seed: of the draws.
    """

    def __init__(self, questions: Sequence[Question], seed: int = 0):
        self.texts = {text: question.document for question in questions for text in question.contexts}
        self.seed = seed

    def texts_of(self, question: Question, passage: str = "right", documents: int = 1) -> tuple[str, ...]:
        """What a question is asked on.

        Args:
            passage: "right": its own texts; "other": as many of other documents; "absent": the passage of the same
                article that does not answer it.
            documents: so many in all: drawn from the split, its own at random places among them.

        Raises:
            ValueError: unknown `passage`, or too few texts to draw from.
        """
        if passage not in PASSAGES:
            raise ValueError(f"`passage` must be one of {', '.join(PASSAGES)}, got {passage!r}.")
        generator = random.Random(f"{self.seed} {question.id}")
        if passage == "other":
            return tuple(self._others(question, len(question.contexts), generator, elsewhere=True))
        own = question.contexts if passage == "right" else (question.absent,)
        texts = self._others(question, max(0, documents - len(own)), generator)
        for text in own:
            texts.insert(generator.randint(0, len(texts)), text)
        return tuple(texts)

    def _others(self, question: Question, count: int, generator: random.Random, elsewhere: bool = False) -> list[str]:
        """Texts that hold none of the answers; `elsewhere`: of other documents only."""
        answers = [normalize(answer) for answer in question.answers]
        found = []
        for text in generator.sample(sorted(self.texts), len(self.texts)):
            if len(found) == count:
                return found
            same = text in question.contexts or (elsewhere and self.texts[text] == question.document)
            if not same and not any(holds(text, answer) for answer in answers):
                found.append(text)
        if len(found) < count:
            raise ValueError(
                f"question {question.id!r} needs {count} other texts without its answers, the split has {len(found)}."
            )
        return found
