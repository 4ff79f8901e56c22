"""TopiOCQA: a record a turn, earlier turns in "Context" (question, answer, ...), its passage in "Gold_passage"."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from dataset_builders.fields import get, get_strings
from dataset_builders.files import json_items
from dataset_builders.schema import NO_ANSWER, Drop, RecordError, Row, make_row

read_json = partial(json_items, prefix="item")


def convert(record: Any) -> Iterator[Row | Drop | RecordError]:
    """A row for a turn."""
    row_id = f"{get(record, 'Conversation_no', int)}-{get(record, 'Turn_no', int)}"
    turns = get_strings(record, "Context")
    if len(turns) % 2:
        raise RecordError("Context", f"must alternate questions and answers, got {len(turns)} texts")
    passage = get(record, "Gold_passage", dict)
    # "page [SEP] section": the page is the document
    title = get(passage, "title", str, "Gold_passage.").split(" [SEP] ")[0]
    answers = [get(record, "Answer", str).strip()]
    for index, other in enumerate(record.get("Additional_answers") or []):
        answers.append(get(other, "Answer", str, f"Additional_answers[{index}].").strip())
    # the reference decides; annotators may disagree on whether there is an answer
    answers = [] if answers[0] == NO_ANSWER else [answer for answer in answers if answer not in ("", NO_ANSWER)]
    history = list(zip(turns[::2], turns[1::2], strict=True))
    question, text = get(record, "Question", str), get(passage, "text", str, "Gold_passage.")
    yield make_row("topiocqa", row_id, question, [text], answers, titles=[title], history=history)
