"""RepLiQA: invented documents with five questions each, about a fifth of them unanswerable; for evaluation only."""

from collections.abc import Iterator
from typing import Any

from dataset_builders.fields import get
from dataset_builders.schema import NO_ANSWER, Drop, RecordError, Row, make_row


def convert(record: Any) -> Iterator[Row | Drop | RecordError]:
    """A row for a question; the document's id stands in for a title."""
    answer = get(record, "answer", str).strip()
    title = get(record, "document_id", str)
    question, text = get(record, "question", str), get(record, "document_extracted", str)
    answers = [] if answer == NO_ANSWER else [answer]
    yield make_row("repliqa", get(record, "question_id", str), question, [text], answers, titles=[title])
