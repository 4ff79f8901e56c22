"""Texts out of what a visitor uploads or pastes: txt, md and pdf, with messages that say what to do otherwise."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

MAX_FILE_BYTES = 5 * 2**20
PDF_SECONDS = 30
# first bytes of files that are often uploaded by mistake
OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive or an office document",
    b"\xd0\xcf\x11\xe0": "an old office document",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x1f\x8b": "a compressed file",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"{\\rtf": "a rich text document",
}
PDF_FAULTS = {
    "encrypted": "is protected by a password. Save it without one and try again.",
    "scanned": "holds {pages} page(s) but no text: it looks like a scan. Run text recognition (OCR) on it first.",
    "pages": "has {pages} pages, more than the {limit} that this Space reads. Upload a part of it.",
    "damaged": "could not be read as a PDF: it seems to be damaged. Open it in a viewer and save it again.",
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
    text = _pdf_text(data, name) if data.lstrip()[:5] == b"%PDF-" else _plain_text(data, name)
    return clean(text, name)


def clean(text: str, name: str) -> str:
    """`text` without control characters, and with one kind of line end.

    Raises:
        DocumentError: nothing to read in it.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # what separates words still does
    text = "".join((" " if letter.isspace() else "") if _is_control(letter) else letter for letter in text).strip()
    if not any(letter.isalnum() for letter in text):
        raise DocumentError(f"“{name}” is empty: there is no text in it.")
    return text


def _plain_text(data: bytes, name: str) -> str:
    kind = next((kind for start, kind in OTHER_KINDS.items() if data.startswith(start)), None)
    if kind is not None:
        raise DocumentError(f"“{name}” is {kind}. Upload plain text (.txt), Markdown (.md) or PDF, or paste the text.")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ("utf-16",)
    else:
        encodings = ("utf-8-sig", "cp1252")
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if _readable(text):
            return text
    raise DocumentError(f"“{name}” is no readable text. Upload plain text (.txt), Markdown (.md) or PDF.")


def _is_control(letter: str) -> bool:
    """Whether a letter is a control character or none at all; line ends and tabs are text."""
    return letter not in "\n\t" and unicodedata.category(letter) in ("Cc", "Cn", "Co", "Cs")


def _readable(text: str) -> bool:
    """Whether nearly all of `text` can be printed: binary junk decodes, too, but to control characters."""
    odd = sum(_is_control(letter) and not letter.isspace() for letter in text)
    return "\0" not in text and odd <= 0.01 * len(text)


def _pdf_text(data: bytes, name: str) -> str:
    # a process of its own, with limits: a hostile PDF can keep a parser busy for hours
    command = [sys.executable, str(Path(__file__).with_name("pdf_text.py")), str(PDF_SECONDS)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=2 * PDF_SECONDS)
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode != 0:
        raise DocumentError(f"“{name}” is too complicated to read here. Paste its text instead.")
    found = json.loads(done.stdout)
    if "fault" in found:
        raise DocumentError(f"“{name}” " + PDF_FAULTS[found["fault"]].format(**found))
    return found["text"]
