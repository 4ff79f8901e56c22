"""Documents out of files, each with its text: the one reader of the commands, the Space and the server.

Readers turn html, docx and epub into Markdown, so that headings and paragraphs are known when passages are cut; what
cannot be read is skipped and reported.
"""

import io
import json
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree import ElementTree

import regex

# what the unpacked parts of a docx or epub file may have together
MAX_UNPACKED_BYTES = 512 << 20
ROWS_AT_ONCE = 1024
# in the order of the bytes that they are tried on, where a text is no UTF-8
ENCODINGS = (
    "utf_32 utf_16 utf_16_le utf_16_be cp1252 cp1250 cp1251 cp1253 cp1254 cp1255 cp1256 koi8_r mac_roman "
    "gb18030 big5 shift_jis euc_jp euc_kr"
).split()
NO_TEXT = ("head", "script", "style", "noscript", "template", "svg", "nav", "iframe", "button", "form")
# what parsers of other people's files raise
PARSER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


class Document(NamedTuple):
    """A document before it is encoded; `nbytes`: what was read for it."""

    id: str
    text: str
    metadata: dict
    nbytes: int = 0


@dataclass
class ReadReport:
    """What became of files: how many gave documents, which were skipped and why, which have no text."""

    read: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)


def find_files(paths: Iterable[str | Path]) -> dict[str, Path]:
    """Files by the names that their documents get: relative to the folder that was given; hidden ones are left out.

    Raises:
        ValueError: a path that is not there, or two files of one name.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            named = {file.relative_to(path): file for file in inside}
            named = {name: file for name, file in named.items() if not any(part[0] == "." for part in name.parts)}
        elif path.is_file():
            named = {Path(path.name): path}
        else:
            raise ValueError(f"no file or folder at {path}.")
        for name, file in named.items():
            # a name that is no Unicode
            name = name.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            if found.setdefault(name, file) != file:
                raise ValueError(f"{found[name]} and {file} are both named {name!r}: add the folder that holds them.")
    return found


def read_documents(
    files: dict[str, Path], report: ReadReport, *, id_column: str = "id", text_column: str = "text"
) -> Iterator[Document]:
    """The documents of files: one a file, one a row of Parquet files (other columns are metadata).

    Args:
        files: of `find_files`.
        report: is filled in; files that cannot be read are skipped.
    """
    for name, path in files.items():
        try:
            if path.suffix.lower() == ".parquet":
                yield from read_parquet(path, id_column, text_column)
                report.read += 1
                continue
            text, metadata = read_file(path)
        except ValueError as error:
            report.skipped[name] = str(error)
            continue
        if text.strip():
            report.read += 1
            yield Document(name, text, {"source": str(path), **metadata}, path.stat().st_size)
        else:
            report.empty.append(name)


def read_file(path: str | Path, name: str | None = None) -> tuple[str, dict]:
    """Text and metadata ("title", "pages": where each page of the text starts) of a file.

    Args:
        name: what the file is called, where `path` is a temporary one.

    Raises:
        ValueError: a file of another kind, or one that cannot be read; the message says why.
    """
    suffix = Path(name or path).suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"files of the kind {suffix or 'without a suffix'!r} are not read, only {', '.join(READERS)}")
    try:
        return READERS[suffix](Path(path).read_bytes())
    except ImportError as error:
        raise ValueError(f'{error}: pip install "xcllama[store]"') from error
    except PARSER_ERRORS as error:
        raise ValueError(f"no readable {suffix[1:]} file: {error or type(error).__name__}") from error


def decode_text(data: bytes) -> str:
    """The text of bytes whose encoding nobody names.

    Raises:
        ValueError: it is no text.
    """
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return data.decode("utf-32")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = None
    if text is None or "\0" in text:
        from charset_normalizer import from_bytes

        best = from_bytes(data, cp_isolation=ENCODINGS).best()
        if best is None:
            raise ValueError("it holds no text in a known encoding")
        # of equal readings the commonest
        text = data.decode("cp1252" if "cp1252" in best.could_be_from_charset else best.encoding)
    odd = len(regex.findall(r"[\p{Cc}\p{Cn}--[\s]]", text, regex.V1))
    if odd > 0.01 * len(text):
        raise ValueError("it holds binary data")
    return text


def _plain(data: bytes) -> tuple[str, dict]:
    return decode_text(data), {}


def _html(data: bytes | str) -> tuple[str, dict]:
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    soup = BeautifulSoup(data, "html.parser")
    title = soup.title.get_text().strip() if soup.title else ""
    for element in soup(NO_TEXT):
        element.decompose()
    escapes = dict.fromkeys(("escape_asterisks", "escape_underscores", "escape_misc"), False)
    text = MarkdownConverter(heading_style="ATX", strip=["a", "img"], **escapes).convert_soup(soup)
    return regex.sub(r"\n{3,}", "\n\n", text).strip(), {"title": title} if title else {}


def _unpacked(data: bytes) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(io.BytesIO(data))
    size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_UNPACKED_BYTES:
        raise ValueError(f"it unpacks to {size:,} bytes, more than {MAX_UNPACKED_BYTES:,}")
    return archive


def _docx(data: bytes) -> tuple[str, dict]:
    import mammoth

    _unpacked(data)
    return _html(mammoth.convert_to_html(io.BytesIO(data)).value)


def _epub(data: bytes) -> tuple[str, dict]:
    archive = _unpacked(data)
    container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
    package = PurePosixPath(container.find(".//{*}rootfile").attrib["full-path"])
    root = ElementTree.fromstring(archive.read(str(package)))
    places = {item.attrib["id"]: item.attrib["href"] for item in root.iterfind(".//{*}item")}
    chapters = [places[item.attrib["idref"]] for item in root.iterfind(".//{*}itemref")]
    texts = [_html(archive.read(str(package.parent / chapter)))[0] for chapter in chapters]
    title = root.findtext(".//{*}title") or ""
    return "\n\n".join(filter(None, texts)), {"title": title.strip()} if title.strip() else {}


def _pdf(data: bytes) -> tuple[str, dict]:
    from pypdf import PdfReader
    from pypdf.errors import FileNotDecryptedError, PyPdfError

    # what is wrong with a file is in the report, once
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        pages = [page.extract_text().strip() for page in PdfReader(io.BytesIO(data)).pages]
    except FileNotDecryptedError as error:
        raise ValueError("it is protected by a password: save it without one") from error
    except PyPdfError as error:
        raise ValueError(str(error)) from error
    if pages and not any(pages):
        raise ValueError(f"its {len(pages)} pages hold no text: scans need text recognition first")
    starts, text = [], ""
    for page in pages:
        text += "\n\n" if text and page else ""
        starts.append(len(text))
        text += page
    # fonts may map to halves of surrogate pairs
    return text.encode("utf-8", "replace").decode(), {"pages": starts}


READERS: dict[str, Callable[[bytes], tuple[str, dict]]] = {
    ".txt": _plain,
    ".md": _plain,
    ".markdown": _plain,
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".docx": _docx,
    ".epub": _epub,
    ".pdf": _pdf,
}


def read_parquet(source, id_column: str = "id", text_column: str = "text") -> Iterator[Document]:
    """The rows of a Parquet file as documents.

    Args:
        source: a path, or an open binary file.

    Raises:
        ValueError: no Parquet file, no such column, or a row without id or text.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(source)
        names = file.schema_arrow.names
        for role, column in (("id", id_column), ("text", text_column)):
            if column not in names:
                raise ValueError(f"{source} has no {role} column {column!r}; its columns are {', '.join(names)}.")
        row = 0
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            for record in batch.to_pylist():
                yield _row(record, id_column, text_column, f"row {row} of {source}")
                row += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{source} is no readable Parquet file: {error}.") from error


def _row(record: dict, id_column: str, text_column: str, where: str) -> Document:
    document_id, text = record.pop(id_column), record.pop(text_column)
    if document_id is None or not isinstance(text, str):
        raise ValueError(f"{where} needs an id and a text, got {document_id!r:.80} and {text!r:.80}.")
    metadata = {name: value for name, value in record.items() if value is not None}
    # dates, bytes and the like become text: metadata are JSON
    return Document(str(document_id), text, json.loads(json.dumps(metadata, default=str)), len(text))
