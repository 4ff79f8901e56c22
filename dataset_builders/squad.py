"""SQuAD v1.1 and v2.0: {"version", "data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}.

A record is an article, or a flat row {"id", "title", "context", "question", "answers": {"text", "answer_start"}} as
on the Hub.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from dataset_builders.fields import get, zip_columns
from dataset_builders.files import json_items
from dataset_builders.schema import Drop, RecordError, Row, make_row

read_json = partial(json_items, prefix="data.item")


def convert(name: str, record: Any) -> Iterator[Row | Drop | RecordError]:
    """A row for each question of an article, or for a flat row."""
    if isinstance(record, dict) and "paragraphs" not in record and "context" in record:
        answers = zip_columns(get(record, "answers", dict), ("text", "answer_start"), "answers.")
        yield question_row(name, record, record, get(record, "title", str), answers, "")
        return
    title = get(record, "title", str)
    for index, paragraph in enumerate(get(record, "paragraphs", list)):
        where = f"paragraphs[{index}]."
        for number, question in enumerate(get(paragraph, "qas", list, where)):
            try:
                yield _question(name, paragraph, question, title, f"{where}qas[{number}].")
            except RecordError as error:
                yield error


def _question(name: str, paragraph: Any, question: Any, title: str, where: str) -> Row | RecordError:
    impossible = question.get("is_impossible", False) if isinstance(question, dict) else False
    answers = []
    for index, answer in enumerate(get(question, "answers", list, where)):
        place = f"{where}answers[{index}]."
        answers.append((get(answer, "text", str, place), get(answer, "answer_start", int, place)))
    if bool(impossible) == bool(answers):
        raise RecordError(where + "is_impossible", f"is {impossible}, but there are {len(answers)} answers")
    return question_row(name, paragraph, question, title, answers, where)


def question_row(
    name: str, paragraph: Any, question: Any, title: str, answers: list[tuple[str, int]], where: str
) -> Row:
    """The row of one question, its answer spans checked."""
    context = get(paragraph, "context", str)
    for index, (text, start) in enumerate(answers):
        if context[start : start + len(text)] != text or start < 0:
            found = context[start : start + len(text)] if start >= 0 else ""
            rule = f"span outside its text: {text!r} at {start}, where the context has {found!r}"
            raise RecordError(f"{where}answers[{index}].answer_start", rule)
    texts = [text for text, _ in answers]
    row_id, asked = get(question, "id", str, where), get(question, "question", str, where).strip()
    return make_row(name, row_id, asked, [context], texts, [title.replace("_", " ")])
