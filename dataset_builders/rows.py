"""Sources that need no conversion: rows already in the schema, and plain text."""

from collections.abc import Iterator
from typing import Any

from dataset_builders.files import Record, SourceError, expand_paths, open_stream
from dataset_builders.schema import FEATURES, Drop, RecordError, Row


def convert_row(record: Any) -> Iterator[Row | Drop | RecordError]:
    """The row itself; whether it follows the schema is checked with all other rows."""
    yield record if isinstance(record, dict) else RecordError("row", "must be an object")


def text_records(path: str | None) -> Iterator[Record]:
    """The paragraphs (blocks of lines between blank lines) of the text files that `path` names, .gz or plain.

    Raises:
        SourceError: nothing there, a directory, an empty file, or bytes that are not UTF-8, with their line.
    """
    if path is None:
        raise ValueError("source 'text' needs `path`: a text file, or a pattern such as folder/*.txt.")
    for file in expand_paths(path):
        count, first, lines = 0, 1, []
        with open_stream(file) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    text = line.decode("utf-8").strip()
                except UnicodeDecodeError as error:
                    problem = f"is not UTF-8: byte {error.start} is {line[error.start]:#04x}"
                    raise SourceError(file, f"line {number}", problem) from None
                if text:
                    first, lines = (number if not lines else first), [*lines, text]
                elif lines:
                    count += 1
                    yield Record(file, f"line {first}", {"file": file, "number": count, "text": "\n".join(lines)})
                    lines = []
        if lines:
            count += 1
            yield Record(file, f"line {first}", {"file": file, "number": count, "text": "\n".join(lines)})
        if not count:
            raise SourceError(file, "", "is empty")


def convert_text(record: dict[str, Any]) -> Iterator[Row]:
    """A row without a question; the file, by its name, is the document."""
    values = {
        "sample_idx": f"{record['file']}:{record['number']}",
        "dataset": "text",
        "titles_list": [record["file"].rsplit("/", 1)[-1]],
        "contexts_list": [record["text"]],
    }
    empty = {"useful_contexts": [], "question": "", "history": [], "answer": "", "answers": [], "answerable": False}
    row = values | empty
    yield {name: row[name] for name in FEATURES}
