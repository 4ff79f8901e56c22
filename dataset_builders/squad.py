"""SQuAD v1.1 and v2.0: {"version", "data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}.

A record is an article, or a flat row {"id", "title", "context", "question", "answers": {"text", "answer_start"}} as
on the Hub.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from dataset_builders.fields import get, readable, zip_columns
from dataset_builders.files import json_items
from dataset_builders.schema import Drop, RecordError, Repair, Row, make_row

read_json = partial(json_items, prefix="data.item")


Outcome = Row | Drop | Repair | RecordError


def convert(name: str, record: Any) -> Iterator[Outcome]:
    """A row for each question of an article, or for a flat row."""
    if isinstance(record, dict) and "paragraphs" not in record and "context" in record:
        answers = zip_columns(get(record, "answers", dict), ("text", "answer_start"), "answers.")
        pairs = [{"text": text, "answer_start": start} for text, start in answers]
        # version 2.0 marks what the text does not answer by no answers
        impossible = name == "squad_v2" and not pairs
        yield from _rows(name, record, record, get(record, "title", str), pairs, impossible, "")
        return
    title = get(record, "title", str)
    for index, paragraph in enumerate(get(record, "paragraphs", list)):
        where = f"paragraphs[{index}]."
        for number, question in enumerate(get(paragraph, "qas", list, where)):
            try:
                yield from _question(name, paragraph, question, title, f"{where}qas[{number}].")
            except RecordError as error:
                yield error


def _question(name: str, paragraph: Any, question: Any, title: str, where: str) -> Iterator[Outcome]:
    answers = get(question, "answers", list, where)
    impossible = bool(question.get("is_impossible", False))
    if impossible == bool(answers):
        raise RecordError(where + "is_impossible", f"is {impossible}, but there are {len(answers)} answers")
    yield from _rows(name, paragraph, question, title, answers, impossible, where)


def _rows(
    name: str, paragraph: Any, question: Any, title: str, answers: list[Any], impossible: bool, where: str
) -> Iterator[Outcome]:
    """The row of one question, after what its answers lost."""
    context = get(paragraph, "context", str)
    row_id, asked = get(question, "id", str, where), get(question, "question", str, where)

    def checked(index: int, answer: Any) -> str:
        place = f"{where}answers[{index}]."
        text, start = get(answer, "text", str, place), get(answer, "answer_start", int, place)
        found = context[start : start + len(text)] if start >= 0 else ""
        if found != text:
            rule = f"span outside its text: {text!r} at {start}, where the context has {found!r}"
            raise RecordError(place + "answer_start", rule)
        return text

    texts, repairs = readable(checked, answers)
    yield from repairs
    yield make_row(name, row_id, asked, [context], [] if impossible else texts or [""], [title.replace("_", " ")])
