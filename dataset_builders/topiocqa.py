"""TopiOCQA: a record a turn, earlier turns in "Context" (question, answer, ...), its passage in "Gold_passage"."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from dataset_builders.fields import get, get_strings, readable
from dataset_builders.files import json_items
from dataset_builders.schema import NO_ANSWER, Drop, RecordError, Repair, Row, make_row

read_json = partial(json_items, prefix="item")


def convert(record: Any) -> Iterator[Row | Drop | Repair | RecordError]:
    """A row for a turn."""
    row_id = f"{get(record, 'Conversation_no', int)}-{get(record, 'Turn_no', int)}"
    turns = get_strings(record, "Context")
    if len(turns) % 2:
        raise RecordError("Context", f"must alternate questions and answers, got {len(turns)} texts")
    passage = get(record, "Gold_passage", dict)
    # "page [SEP] section": the page is the document
    title = get(passage, "title", str, "Gold_passage.").split(" [SEP] ")[0]
    reference, others = get(record, "Answer", str).strip(), record.get("Additional_answers") or []
    answers, repairs = readable(_answer, [record, *others])
    yield from repairs
    # the reference decides; annotators may disagree on whether there is an answer
    answers = [] if reference == NO_ANSWER else [answer for answer in answers if answer.strip() != NO_ANSWER]
    history = list(zip(turns[::2], turns[1::2], strict=True))
    question, text = get(record, "Question", str), get(passage, "text", str, "Gold_passage.")
    yield make_row("topiocqa", row_id, question, [text], answers, titles=[title], history=history)


def _answer(index: int, record: Any) -> str:
    """The answer of the record itself (`index` 0) or of an additional annotator."""
    return get(record, "Answer", str, f"Additional_answers[{index - 1}]." if index else "")
