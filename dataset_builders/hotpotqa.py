"""HotpotQA: [{"_id", "question", "answer", "supporting_facts", "context": [[title, sentences]]}], both settings.

The paragraphs of a question are shuffled, and the whole question is repeated `num_copies` times with other shuffles.
On the Hub `supporting_facts` and `context` are columns. In fullwiki the retrieved paragraphs may lack a supporting
one: the answer stays the reference answer, as in the official evaluation, and `useful_contexts` lists the supporting
paragraphs that are there.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from dataset_builders.fields import Settings, get, get_strings, zip_columns
from dataset_builders.files import json_items
from dataset_builders.schema import Drop, RecordError, Row, make_row

read_json = partial(json_items, prefix="item")


def convert(name: str, record: Any, settings: Settings) -> Iterator[Row | Drop | RecordError]:
    """`num_copies` rows for a question."""
    row_id = get(record, "_id" if "_id" in record else "id", str)
    question = get(record, "question", str)
    if "answer" not in record:
        yield Drop("no answer given (test set)")
        return
    answer = get(record, "answer", str)
    paragraphs = [(title, text) for title, text in _paragraphs(record) if text]
    supporting = _supporting_titles(record)
    if not paragraphs:
        yield Drop("no paragraph")
        return
    for copy in range(settings.num_copies):
        order = list(paragraphs)
        settings.random(name, row_id, copy).shuffle(order)
        yield make_row(
            name,
            row_id if copy == 0 else f"{row_id}-{copy}",
            question,
            [text for _, text in order],
            [answer],
            titles=[title for title, _ in order],
            useful=[index for index, (title, _) in enumerate(order) if title in supporting],
        )


def _paragraphs(record: Any) -> Iterator[tuple[str, str]]:
    context = get(record, "context", dict if isinstance(record.get("context"), dict) else list)
    if isinstance(context, dict):
        context = zip_columns(context, ("title", "sentences"), "context.")
    for index, paragraph in enumerate(context):
        valid = isinstance(paragraph, list | tuple) and len(paragraph) == 2 and isinstance(paragraph[0], str)
        sentences = paragraph[1] if valid else None
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise RecordError(f"context[{index}]", f"must be [title, sentences], got {str(paragraph)[:80]}")
        # sentences bring their own leading spaces
        yield paragraph[0], "".join(sentences).strip()


def _supporting_titles(record: Any) -> set[str]:
    facts = get(record, "supporting_facts", dict if isinstance(record.get("supporting_facts"), dict) else list)
    if isinstance(facts, dict):
        return set(get_strings(facts, "title", "supporting_facts."))
    for index, fact in enumerate(facts):
        if not isinstance(fact, list) or len(fact) != 2 or not isinstance(fact[0], str):
            raise RecordError(f"supporting_facts[{index}]", f"must be [title, sentence number], got {str(fact)[:80]}")
    return {title for title, _ in facts}
