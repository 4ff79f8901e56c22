"""Passages with their questions, out of the rows of `dataset_builders`: what training draws from."""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset_builders import SOURCES, build_mix, validate_row
from dataset_builders.tasks import sentences
from xcllama.training.recipe import DataSection

Turn = tuple[str, str]


@dataclass(frozen=True)
class Question:
    """A question of a source, with the earlier turns of its conversation."""

    text: str
    answer: str
    source: str
    history: tuple[Turn, ...] = ()


@dataclass
class Passage:
    """A text of a bounded length, and the questions that can be answered from it."""

    text: str
    source: str
    questions: list[Question] = field(default_factory=list)


def read_passages(data: DataSection, seed: int) -> list[Passage]:
    """The training passages of a recipe, in an order that depends on `seed` alone.

    Raises:
        ValueError: an unknown or non-commercial source, rows that lack columns, no passage left.
    """
    passages: dict[str, Passage] = {}
    counts: dict[str, int] = {}
    for row in _rows(data):
        source = row["dataset"]
        for text in _windows(row, data, seed):
            if text not in passages:
                if data.max_passages is not None and counts.get(source, 0) >= data.max_passages:
                    continue
                counts[source] = counts.get(source, 0) + 1
                passages[text] = Passage(text, source)
            question = _question(row, text, data)
            if question is not None:
                passages[text].questions.append(question)
    kept = [passage for passage in passages.values() if passage.questions or len(sentences(passage.text)) >= 2]
    if not kept:
        raise ValueError(f"The sources {', '.join(data.sources)} hold no passage to train on.")
    random.Random(f"{seed}:passages").shuffle(kept)
    return kept


def _rows(data: DataSection) -> Iterator[dict[str, Any]]:
    named = [name for name in data.sources if name in SOURCES]
    if closed := [name for name in named if not SOURCES[name].commercial]:
        raise ValueError(
            f"Source {closed[0]!r} does not allow commercial use, so weights trained on it could not be Apache-2.0."
        )
    for name in data.sources:
        if name not in SOURCES:
            yield from _file_rows(name)
    if named:
        yield from build_mix(named, commercial_only=True, seed=0).rows("train")


def _file_rows(name: str) -> Iterator[dict[str, Any]]:
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"`data.sources` holds {name!r}: neither a source ({', '.join(SOURCES)}) nor a JSON Lines file."
        )
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield validate_row(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: {error}; the schema is in dataset_builders/schema.py."
                ) from None


def _windows(row: dict[str, Any], data: DataSection, seed: int) -> Iterable[str]:
    """The texts that a row's questions are asked of: its useful context, or windows of a longer one."""
    index = (row["useful_contexts"] or [0])[0]
    text, size = row["contexts_list"][index], data.max_context_words
    words = text.split()
    if len(words) <= size:
        return [text.strip()]
    generator = random.Random(f"{seed}:{row['sample_idx']}:{index}")
    answer = row["answer"]
    found = text.lower().find(answer.lower()) if answer and len(answer) > 3 else -1
    if found >= 0 and not row["history"]:
        first = len(text[:found].split())
        low, high = max(0, first + len(answer.split()) - size), min(first, len(words) - size)
        start = generator.randint(min(low, high), high)
        return [" ".join(words[start : start + size])]
    # windows of a text depend on the text alone: the questions on one text share them
    generator = random.Random(f"{seed}:{text[:200]}")
    limit = len(words) - size
    return [
        " ".join(words[start : start + size]) for start in (generator.randint(0, limit) for _ in range(data.windows))
    ]


def _question(row: dict[str, Any], text: str, data: DataSection) -> Question | None:
    """The row's question, when this text can answer it and the answer is short."""
    answer = row["answer"].strip().rstrip(".")
    if not row["question"] or not row["answerable"] or not answer or len(answer.split()) > data.max_answer_words:
        return None
    useful = row["useful_contexts"] or [0]
    # an answer that rests on several contexts may need them all
    whole = len(useful) == 1 and text == row["contexts_list"][useful[0]].strip()
    if not whole and (answer.lower() not in text.lower() or len(answer) <= 3):
        return None
    question = row["question"].strip()
    question = question[0].upper() + question[1:]
    history = tuple((turn["question"], turn["answer"]) for turn in row["history"])
    return Question(
        question, answer, row["dataset"], history[len(history) - data.max_history :] if data.max_history else ()
    )
