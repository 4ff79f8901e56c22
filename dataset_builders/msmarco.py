"""MS MARCO question answering v2.1: columns {"query": {"0": ...}, "passages": {"0": [...]}, ...}.

On the Hub one row a question, with the passages as columns. Passages have no title; their document is the question's
own set.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from dataset_builders.fields import get, get_strings, readable
from dataset_builders.files import json_columns
from dataset_builders.schema import NONE_GIVEN, Drop, RecordError, Repair, Row, make_row

NO_ANSWER_PRESENT = "No Answer Present."
COLUMNS = ("query_id", "query", "passages", "answers", "wellFormedAnswers")

read_json = partial(json_columns, names=COLUMNS)


def convert(record: Any) -> Iterator[Row | Drop | Repair | RecordError]:
    """A row for a question."""
    row_id = str(get(record, "query_id", int))
    texts, selected = _passages(record)
    kept = [index for index, text in enumerate(texts) if text.strip()]
    if not kept:
        yield Drop("no passage")
        return
    # absent well-formed answers are the string "[]"
    well_formed = record.get("wellFormedAnswers")
    given = get(record, "answers", list) + (well_formed if isinstance(well_formed, list) else [])
    answers, repairs = readable(_answer, given)
    yield from repairs
    answers = [answer for answer in answers if answer.strip()]
    if not answers:
        yield Drop(NONE_GIVEN)
        return
    absent = answers[0].strip() == NO_ANSWER_PRESENT
    answers = [] if absent else [answer for answer in answers if answer.strip() != NO_ANSWER_PRESENT]
    useful = [index for index, old in enumerate(kept) if selected[old]] if answers else []
    question = get(record, "query", str)
    yield make_row("msmarco", row_id, question, [texts[index] for index in kept], answers, useful=useful)


def _answer(index: int, answer: Any) -> str:
    if not isinstance(answer, str):
        raise RecordError(f"answers[{index}]", f"must be a string, got {type(answer).__name__}")
    return answer


def _passages(record: Any) -> tuple[list[str], list[bool]]:
    passages = get(record, "passages", dict if isinstance(record.get("passages"), dict) else list)
    if isinstance(passages, dict):
        texts, flags = (
            get_strings(passages, "passage_text", "passages."),
            get(passages, "is_selected", list, "passages."),
        )
    else:
        texts = [get(passage, "passage_text", str, f"passages[{i}].") for i, passage in enumerate(passages)]
        flags = [get(passage, "is_selected", int, f"passages[{i}].") for i, passage in enumerate(passages)]
    if len(flags) != len(texts) or any(flag not in (0, 1) for flag in flags):
        raise RecordError("passages.is_selected", f"must be 0 or 1 for each of {len(texts)} passages, got {flags}")
    return texts, [bool(flag) for flag in flags]
