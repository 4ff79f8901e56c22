"""Texts out of what a visitor uploads or pastes, read as everywhere in XC-Llama, with messages for visitors."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

from xcllama.documents import READERS, decode_text

MAX_FILE_BYTES = 5 * 2**20
# looked at before any work: no document of so many letters is short enough in tokens
MAX_TEXT_LETTERS = 2**19
MAX_NAME_LETTERS = 60
READING_SECONDS = 30
KINDS = "text, Markdown, HTML, DOCX, EPUB or PDF"
# first bytes of files that are often uploaded by mistake
OTHER_KINDS = {
    b"\xd0\xcf\x11\xe0": "an old office document",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x1f\x8b": "a compressed file",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"{\\rtf": "a rich text document",
}


class DocumentError(ValueError):
    """A document that cannot be taken; its message is for the visitor."""


def read_file(path: str | Path, name: str) -> str:
    """The text of an uploaded file.

    Args:
        path: the file.
        name: what the visitor calls it, for messages.

    Raises:
        DocumentError: too big, empty, of another kind, or without text.
    """
    size = Path(path).stat().st_size
    if size > MAX_FILE_BYTES:
        raise DocumentError(
            f"“{name}” has {size / 2**20:.1f} MB; a file may have {MAX_FILE_BYTES // 2**20} MB. Upload a part of it."
        )
    data = Path(path).read_bytes()
    kind = next((kind for start, kind in OTHER_KINDS.items() if data.startswith(start)), None)
    if kind is not None:
        raise DocumentError(f"“{name}” is {kind}. Upload {KINDS}, or paste the text.")
    suffix = ".pdf" if data.lstrip()[:5] == b"%PDF-" else Path(name).suffix.lower()
    if suffix in (".txt", ".md", ".markdown", "") or suffix not in READERS:
        text = _plain_text(data, name)
    else:
        text = _read_apart(path, suffix, name)
    return clean(text, name)


def clean(text: str, name: str) -> str:
    """`text` without control characters, and with one kind of line end.

    Raises:
        DocumentError: nothing to read in it, or more than any document may have.
    """
    if len(text) > MAX_TEXT_LETTERS:
        raise DocumentError(
            f"“{name}” is too long: {len(text):,} letters, more than {MAX_TEXT_LETTERS:,}. Add parts of it."
        )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # what separates words still does
    text = "".join((" " if letter.isspace() else "") if _is_control(letter) else letter for letter in text).strip()
    if not any(letter.isalnum() for letter in text):
        raise DocumentError(f"“{name}” is empty: there is no text in it.")
    return text


def _is_control(letter: str) -> bool:
    """Whether a letter is a control character or none at all; line ends and tabs are text."""
    return letter not in "\n\t" and unicodedata.category(letter) in ("Cc", "Cn", "Co", "Cs")


def _plain_text(data: bytes, name: str) -> str:
    try:
        return decode_text(data)
    except ValueError as error:
        raise DocumentError(f"“{name}” is no readable text: {error}. Upload {KINDS}.") from error


def _read_apart(path: str | Path, suffix: str, name: str) -> str:
    """The text of a file with a format, read by a process with limits: a hostile one keeps a parser busy for hours."""
    script = str(Path(__file__).with_name("read_apart.py"))
    command = [sys.executable, script, str(READING_SECONDS), str(Path(path).absolute()), f"document{suffix}"]
    try:
        # from the folder of the Space, where what it brings along is found
        done = subprocess.run(command, capture_output=True, timeout=2 * READING_SECONDS, cwd=Path(script).parent)
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode != 0:
        raise DocumentError(f"“{name}” is too complicated to read here. Paste its text instead.")
    found = json.loads(done.stdout)
    if "fault" in found:
        raise DocumentError(f"“{name}” could not be read: {found['fault']}.")
    return found["text"]
