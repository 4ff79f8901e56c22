"""Documents out of files: text, Markdown, PDF and Parquet, one at a time."""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".markdown")
SUFFIXES = (*TEXT_SUFFIXES, ".pdf", ".parquet")
ROWS_AT_ONCE = 1024


class Document(NamedTuple):
    """A document before it is encoded."""

    id: str
    text: str
    metadata: dict


def files_of(paths: Iterable[str | Path]) -> Iterator[tuple[Path, str]]:
    """(file, name relative to the folder that was given) of every readable file, folders searched in order.

    Raises:
        ValueError: a path that is not there, or a file of another kind.
    """
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            yield from ((file, file.relative_to(path).as_posix()) for file in found)
        elif not path.is_file():
            raise ValueError(f"no file or folder at {path}.")
        elif path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}.")
        else:
            yield path, path.name


def read_documents(
    paths: Iterable[str | Path], *, id_column: str = "id", text_column: str = "text", skip_bad: bool = False
) -> Iterator[Document]:
    """The documents of files and folders: a file each, a row each of Parquet files (other columns are metadata).

    Args:
        id_column, text_column: of Parquet files.
        skip_bad: log files that cannot be read instead of raising.

    Raises:
        ValueError: a file that cannot be read.
    """
    for path, name in files_of(paths):
        try:
            if path.suffix.lower() == ".parquet":
                yield from read_parquet(path, id_column, text_column)
            else:
                read = _read_pdf if path.suffix.lower() == ".pdf" else _read_text
                yield Document(name, read(path), {"source": str(path)})
        except ValueError as error:
            if not skip_bad:
                raise
            logger.warning(f"skipped: {error}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}.") from error


def _read_pdf(path: Path) -> str:
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        return "\n\n".join(page.extract_text() for page in PdfReader(path).pages).strip()
    except (PyPdfError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no readable PDF: {error}.") from error


def parquet_columns(file, path, id_column: str, text_column: str) -> list[str]:
    """The columns of an open Parquet file, checked.

    Raises:
        ValueError: the id or text column is not there.
    """
    names = file.schema_arrow.names
    for role, column in (("id", id_column), ("text", text_column)):
        if column not in names:
            raise ValueError(f"{path} has no {role} column {column!r}; its columns are {', '.join(names)}.")
    return names


def read_parquet(source, id_column: str = "id", text_column: str = "text", start: int = 0, stop: int | None = None):
    """Rows `start` to `stop` of a Parquet file as documents; only the row groups that hold them are read.

    Args:
        source: a path, or an open binary file.

    Raises:
        ValueError: no Parquet file, or no such column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(source)
        parquet_columns(file, source, id_column, text_column)
        groups, first = [], None
        position = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if position + count > start and (stop is None or position < stop):
                groups.append(group)
                first = position if first is None else first
            position += count
        row = first or 0
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=groups) if groups else ():
            for record in batch.to_pylist():
                if row >= start and (stop is None or row < stop):
                    yield _document(record, id_column, text_column, source, row)
                row += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{source} is no readable Parquet file: {error}.") from error


def _document(record: dict, id_column: str, text_column: str, source, row: int) -> Document:
    document_id, text = record.pop(id_column), record.pop(text_column)
    if document_id is None or not isinstance(text, str):
        raise ValueError(f"row {row} of {source} needs an id and a text, got {document_id!r:.80} and {text!r:.80}.")
    metadata = {name: value for name, value in record.items() if value is not None}
    # dates, bytes and the like become text: metadata are JSON
    return Document(str(document_id), text, json.loads(json.dumps(metadata, default=str)))
