"""Natural Questions, original and simplified JSON lines, and the Hub's columns.

The context is the gold long answer; the answers are the short ones inside it, or yes or no. A question that its
annotators found no long answer to becomes an unanswerable row on a top-level passage of the same page. With several
annotators (the development set) two must have marked a long answer, as in the official evaluation.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dataset_builders.fields import Settings, get, readable, zip_columns
from dataset_builders.files import file_records
from dataset_builders.schema import Drop, RecordError, Repair, Row, make_row
from dataset_builders.splits import normalize

Span = tuple[int, int]
MANY_ANNOTATORS, NEEDED_OF_MANY = 5, 2
_HUB_YES_NO = {-1: "NONE", 0: "NO", 1: "YES"}


@dataclass(frozen=True)
class Annotation:
    """What one annotator marked; no long answer is None."""

    long: Span | None
    short: list[Span]
    yes_no: str
    repairs: list[Repair]


def convert(record: Any, settings: Settings) -> Iterator[Row | Drop | Repair | RecordError]:
    """A row for a question, or the reason for none."""
    question = _question(record)
    if settings.nq_open is not None and normalize(question) not in settings.nq_open:
        yield Drop("not in NQ-open")
        return
    row_id = str(record["id"] if "id" in record else get(record, "example_id", int))
    title, tokens = _document(record)
    given = list(_annotations(record))
    annotations, repairs = readable(partial(_annotation, len(tokens)), given)
    yield from [*repairs, *(repair for annotation in annotations for repair in annotation.repairs)]
    marked = [annotation for annotation in annotations if annotation.long]
    needed = NEEDED_OF_MANY if len(given) >= MANY_ANNOTATORS else 1
    if len(marked) < needed:
        passages = [text for span in _passages(record, len(tokens)) if (text := _text(tokens, span))]
        if not passages:
            yield Drop("no long answer, and no other passage")
            return
        passage = settings.random("natural_questions", row_id).choice(passages)
        yield make_row("natural_questions", row_id, question, [passage], [], titles=[title])
        return
    long = Counter(annotation.long for annotation in marked).most_common(1)[0][0]
    agreeing = [annotation for annotation in marked if annotation.long == long]
    answers = [text for annotation in agreeing for span in annotation.short if (text := _text(tokens, span))]
    answers += [annotation.yes_no.lower() for annotation in agreeing if annotation.yes_no != "NONE"]
    if not answers:
        yield Drop("long answer only")
        return
    yield make_row("natural_questions", row_id, question, [_text(tokens, long)], answers, titles=[title])


def _question(record: Any) -> str:
    if isinstance(record, dict) and isinstance(record.get("question"), dict):
        return get(record["question"], "text", str, "question.").strip()
    return get(record, "question_text", str).strip()


def _document(record: Any) -> tuple[str, list[tuple[str, bool]]]:
    """Title and (token, is markup) of the page."""
    if "document_tokens" in record:
        tokens = [
            (
                get(token, "token", str, f"document_tokens[{i}]."),
                get(token, "html_token", bool, f"document_tokens[{i}]."),
            )
            for i, token in enumerate(get(record, "document_tokens", list))
        ]
        return get(record, "document_title", str), tokens
    if "document" in record:
        document = get(record, "document", dict)
        tokens = zip_columns(get(document, "tokens", dict, "document."), ("token", "is_html"), "document.tokens.")
        return get(document, "title", str, "document."), tokens
    words = get(record, "document_text", str).split(" ")
    query = parse_qs(urlsplit(get(record, "document_url", str).replace("&amp;", "&")).query)
    title = query.get("title", [""])[0].replace("_", " ")
    return title, [(word, word.startswith("<") and word.endswith(">")) for word in words]


def _text(tokens: list[tuple[str, bool]], span: Span) -> str:
    return " ".join(token for token, is_markup in tokens[span[0] : span[1]] if not is_markup).strip()


def _annotations(record: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Long answer, short answers and yes or no of each annotator, as the original files write them."""
    annotations = record.get("annotations")
    if isinstance(annotations, dict):
        columns = zip_columns(annotations, ("long_answer", "short_answers", "yes_no_answer"), "annotations.")
        for long, short, yes_no in columns:
            spans = zip_columns(short, ("start_token", "end_token"), "annotations.short_answers.")
            yield long, [{"start_token": start, "end_token": end} for start, end in spans], _HUB_YES_NO.get(yes_no)
        return
    for index, annotation in enumerate(get(record, "annotations", list)):
        where = f"annotations[{index}]."
        long, short = get(annotation, "long_answer", dict, where), get(annotation, "short_answers", list, where)
        yield long, short, get(annotation, "yes_no_answer", str, where)


def _annotation(num_tokens: int, index: int, annotation: tuple[Any, Any, Any]) -> Annotation:
    """The annotation, its spans checked to lie inside the page, and the short ones inside the long one."""
    where = f"annotations[{index}]."
    if annotation[2] is None:
        raise RecordError(where + "yes_no_answer", "must be -1, 0 or 1")
    long = _span((0, num_tokens), where + "long_answer", annotation[0])
    bounds = long or (0, num_tokens)
    short, repairs = readable(lambda n, span: _span(bounds, f"{where}short_answers[{n}]", span), annotation[1])
    return Annotation(long, [span for span in short if span], annotation[2], repairs)


def _span(bounds: Span, where: str, record: Any) -> Span | None:
    """The tokens of a span; None: it says that there is none."""
    start, end = get(record, "start_token", int, f"{where}."), get(record, "end_token", int, f"{where}.")
    if start == end == -1:
        return None
    if not bounds[0] <= start < end <= bounds[1]:
        raise RecordError(where, f"span outside its text: [{start}, {end}] of {list(bounds)}")
    return start, end


def _passages(record: Any, num_tokens: int) -> list[Span]:
    """The top-level passages of the page."""
    candidates = record.get("long_answer_candidates")
    if isinstance(candidates, dict):
        columns = zip_columns(candidates, ("start_token", "end_token", "top_level"), "long_answer_candidates.")
        return [(start, end) for start, end, top_level in columns if top_level]
    spans = []
    for index, candidate in enumerate(get(record, "long_answer_candidates", list)):
        where = f"long_answer_candidates[{index}]"
        if get(candidate, "top_level", bool, f"{where}."):
            spans.append(_span((0, num_tokens), where, candidate))
    return [span for span in spans if span]


def read_nq_open(path: str) -> frozenset[str]:
    """The normalized questions of the NQ-open files at `path` (JSON lines with a "question")."""
    return frozenset(normalize(get(record.value(), "question", str)) for record in file_records(path))
