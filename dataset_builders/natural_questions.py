"""Natural Questions, original and simplified JSON lines, and the Hub's columns.

The context is the gold long answer; the answers are the short ones inside it, or yes or no. A question that its
annotators found no long answer to becomes an unanswerable row on a top-level passage of the same page. With several
annotators (the development set) two must have marked a long answer, as in the official evaluation.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dataset_builders.fields import get, zip_columns
from dataset_builders.files import file_records
from dataset_builders.schema import Drop, RecordError, Row, make_row
from dataset_builders.settings import Settings
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


def convert(record: Any, settings: Settings) -> Iterator[Row | Drop | RecordError]:
    """A row for a question, or the reason for none."""
    question = _question(record)
    if settings.nq_open is not None and normalize(question) not in settings.nq_open:
        yield Drop("not in NQ-open")
        return
    row_id = str(record["id"] if "id" in record else get(record, "example_id", int))
    title, tokens = _document(record)
    annotations = [_checked(annotation, tokens) for annotation in _annotations(record)]
    marked = [annotation for annotation in annotations if annotation.long]
    needed = NEEDED_OF_MANY if len(annotations) >= MANY_ANNOTATORS else 1
    if len(marked) < needed:
        passages = [text for span in _passages(record) if (text := _text(tokens, span))]
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


def _checked(annotation: Annotation, tokens: list[tuple[str, bool]]) -> Annotation:
    """The annotation, its spans checked to lie inside the page, and the short ones inside the long one."""
    for name, span in [("long_answer", annotation.long), *(("short_answers", span) for span in annotation.short)]:
        first, last = annotation.long if name == "short_answers" and annotation.long else (0, len(tokens))
        if span is not None and not first <= span[0] < span[1] <= last:
            raise RecordError(f"annotations.{name}", f"span outside its text: {list(span)} of [{first}, {last}]")
    return annotation


def _annotations(record: Any) -> list[Annotation]:
    if isinstance(record.get("annotations"), dict):
        return [_hub_annotation(*columns) for columns in _hub_columns(record["annotations"])]
    found = []
    for index, annotation in enumerate(get(record, "annotations", list)):
        where = f"annotations[{index}]."
        long = _span(get(annotation, "long_answer", dict, where), where + "long_answer.")
        short = [
            _span(span, f"{where}short_answers[{number}].")
            for number, span in enumerate(get(annotation, "short_answers", list, where))
        ]
        found.append(Annotation(long, [span for span in short if span], get(annotation, "yes_no_answer", str, where)))
    return found


def _span(record: Any, where: str) -> Span | None:
    start, end = get(record, "start_token", int, where), get(record, "end_token", int, where)
    return None if start == end == -1 else (start, end)


def _hub_columns(annotations: dict[str, Any]) -> list[tuple[Any, ...]]:
    return zip_columns(annotations, ("long_answer", "short_answers", "yes_no_answer"), "annotations.")


def _hub_annotation(long: Any, short: Any, yes_no: Any) -> Annotation:
    spans = zip_columns(short, ("start_token", "end_token"), "annotations.short_answers.")
    if yes_no not in _HUB_YES_NO:
        raise RecordError("annotations.yes_no_answer", f"must be -1, 0 or 1, got {yes_no!r}")
    return Annotation(_span(long, "annotations.long_answer."), spans, _HUB_YES_NO[yes_no])


def _passages(record: Any) -> list[Span]:
    """The top-level passages of the page."""
    candidates = record.get("long_answer_candidates")
    if isinstance(candidates, dict):
        columns = zip_columns(candidates, ("start_token", "end_token", "top_level"), "long_answer_candidates.")
        return [(start, end) for start, end, top_level in columns if top_level]
    spans = []
    for index, candidate in enumerate(get(record, "long_answer_candidates", list)):
        where = f"long_answer_candidates[{index}]."
        if get(candidate, "top_level", bool, where):
            spans.append(_span(candidate, where))
    return [span for span in spans if span]


def read_nq_open(path: str) -> frozenset[str]:
    """The normalized questions of the NQ-open files at `path` (JSON lines with a "question")."""
    return frozenset(normalize(get(record.value(), "question", str)) for record in file_records(path))
