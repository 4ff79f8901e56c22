"""What the Space takes and refuses: texts, PDFs, scans, junk; and what a message says."""

import sys
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SPACE = Path(__file__).resolve().parent.parent / "space"
sys.path.insert(0, str(SPACE))
from documents import DocumentError, clean, read_file  # noqa: E402

pypdf = pytest.importorskip("pypdf", reason="the extra `space` is not installed")


def _dictionary(values: dict) -> dict:
    return pypdf.generic.DictionaryObject({pypdf.generic.NameObject(key): value for key, value in values.items()})


def make_pdf(text: str | None, password: str | None = None, pages: int = 1) -> bytes:
    """A PDF of pages with one line of `text`, None: with nothing, as a scan without its image."""
    writer = pypdf.PdfWriter()
    for _ in range(pages):
        page = writer.add_blank_page(300, 300)
        if text is not None:
            name = pypdf.generic.NameObject
            font = {
                name("/Type"): name("/Font"),
                name("/Subtype"): name("/Type1"),
                name("/BaseFont"): name("/Helvetica"),
            }
            fonts = pypdf.generic.DictionaryObject({name("/F1"): pypdf.generic.DictionaryObject(font)})
            page[name("/Resources")] = pypdf.generic.DictionaryObject({name("/Font"): fonts})
            stream = pypdf.generic.StreamObject()
            stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
            page[name("/Contents")] = writer._add_object(stream)
    if password is not None:
        writer.encrypt(password)
    file = BytesIO()
    writer.write(file)
    return file.getvalue()


def read(tmp_path: Path, data: bytes, name: str = "given.txt") -> str:
    (tmp_path / name).write_bytes(data)
    return read_file(tmp_path / name, name)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain\r\nlines\rhere", "plain\nlines\nhere"),
        ("\ufeffcafé".encode(), "café"),
        ("café".encode("utf-16"), "café"),
        ("caf\xe9 \x96 bar".encode("latin-1"), "café – bar"),
        (b"# Title\n\n* item\n", "# Title\n\n* item"),
        (b"a\x07b\tc" + 200 * b".", "ab\tc" + 200 * "."),
        ("a\xa0b\x0cc می\u200cخواهم".encode(), "a\xa0b c می\u200cخواهم"),
    ],
    ids=["line-ends", "utf-8-bom", "utf-16", "cp1252", "markdown", "control", "spaces"],
)
def test_texts(tmp_path, data, text):
    assert read(tmp_path, data) == text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"--- *** ---", "is empty"),
        (bytes(range(256)) * 8, "no readable text"),
        (b"PK\x03\x04 and more", "no readable text"),
        (b"\x89PNG\r\n\x1a\n", "an image"),
        (b"\xff\xfeabc", "no readable text"),
        (b"%PDF-1.4 and then nothing", "no readable pdf file"),
        (b"x" * (5 * 2**20 + 1), "a file may have 5 MB"),
        (make_pdf(None), "scans need text recognition"),
        (make_pdf("secret", password="key"), "protected by a password"),
    ],
    ids=[
        "empty",
        "blank",
        "signs",
        "junk",
        "zip",
        "image",
        "odd-utf-16",
        "broken-pdf",
        "huge",
        "scan",
        "locked",
    ],
)
def test_refused_with_a_message(tmp_path, data, says):
    with pytest.raises(DocumentError, match=says) as raised:
        read(tmp_path, data, "my file")
    assert "my file" in str(raised.value)


def test_pdf(tmp_path):
    assert read(tmp_path, make_pdf("The lighthouse is red."), "paper.pdf") == "The lighthouse is red."
    # told by what is in it, not by its name
    assert read(tmp_path, make_pdf("Text."), "paper.txt") == "Text."


def test_formats_that_the_commands_read(tmp_path):
    page = b"<html><head><title>x</title></head><body><h1>Ferry</h1><p>It leaves at noon.</p></body></html>"
    assert read(tmp_path, page, "page.html") == "# Ferry\n\nIt leaves at noon."
    with pytest.raises(DocumentError, match="no readable docx file"):
        read(tmp_path, b"PK\x03\x04 and more", "minutes.docx")


def test_a_pdf_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("documents.READING_SECONDS", 0)
    with pytest.raises(DocumentError, match="too complicated"):
        read(tmp_path, make_pdf("Text."))


# a PDF is read by a process of its own
@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=300))
def test_any_bytes_give_text_or_a_message(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    try:
        text = read(folder, data)
    except DocumentError:
        return
    assert text
    assert clean(text, "again") == text
