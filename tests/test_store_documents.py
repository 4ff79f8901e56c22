"""Files of any kind become documents, documents passages; spans map back to the original exactly."""

import io
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_support import ByteProcessor, model
from test_store_command import pdf_bytes

from xcllama.store import ContextStore
from xcllama.store.documents import ReadReport, decode_text, find_files, read_documents, read_file, split_passages

HTML = """<!doctype html><html><head><title>The harbour</title><style>p {color: red}</style></head><body>
<nav>Home | About</nav><h1>Harbour</h1><p>The <b>lighthouse</b> was built in <a href="/x">1871</a>.</p>
<script>alert("no text")</script><h2>Keepers</h2><ul><li>Anna Berg</li><li>Jon Voll</li></ul>
<table><tr><th>Year</th><th>Ships</th></tr><tr><td>1900</td><td>17</td></tr></table></body></html>"""


def archive(files: dict[str, str]) -> bytes:
    """A zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return buffer.getvalue()


def docx_bytes(*paragraphs: tuple[str, str]) -> bytes:
    """A document of (style, text) paragraphs."""
    space = "http://schemas.openxmlformats.org"
    body = "".join(
        f'<w:p><w:pPr><w:pStyle w:val="{style}"/></w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>'
        for style, text in paragraphs
    )
    types = (
        f'<Types xmlns="{space}/package/2006/content-types"><Default Extension="rels" ContentType="application/vnd.'
    )
    types += (
        'openxmlformats-package.relationships+xml"/><Default Extension="xml" ContentType="application/xml"/></Types>'
    )
    relation = f'<Relationships xmlns="{space}/package/2006/relationships"><Relationship Id="r1" Type="{space}'
    relation += '/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>'
    styles = "".join(
        f'<w:style w:type="paragraph" w:styleId="{name}"><w:name w:val="{title}"/></w:style>'
        for name, title in (("Heading1", "heading 1"), ("Normal", "Normal"))
    )
    word = f'xmlns:w="{space}/wordprocessingml/2006/main"'
    links = f'<Relationships xmlns="{space}/package/2006/relationships"><Relationship Id="r1" Type="{space}'
    links += '/officeDocument/2006/relationships/styles" Target="styles.xml"/></Relationships>'
    return archive(
        {
            "[Content_Types].xml": types,
            "_rels/.rels": relation,
            "word/_rels/document.xml.rels": links,
            "word/styles.xml": f"<w:styles {word}>{styles}</w:styles>",
            "word/document.xml": f"<w:document {word}><w:body>{body}</w:body></w:document>",
        }
    )


EPUB = {
    "mimetype": "application/epub+zip",
    "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OPS/book.opf"/></rootfiles></container>',
    "OPS/book.opf": '<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata>'
    '<dc:title>A book</dc:title></metadata><manifest><item id="two" href="2.xhtml"/><item id="one" href="1.xhtml"/>'
    '</manifest><spine><itemref idref="one"/><itemref idref="two"/></spine></package>',
    "OPS/1.xhtml": "<html><body><h1>First</h1><p>It begins.</p></body></html>",
    "OPS/2.xhtml": "<html><body><h1>Second</h1><p>It ends.</p></body></html>",
}


def read(folder: Path, name: str, content: bytes) -> tuple[str, dict]:
    (folder / name).write_bytes(content)
    return read_file(folder / name)


def test_html_keeps_headings_and_leaves_out_what_is_no_text(tmp_path):
    text, metadata = read(tmp_path, "a.html", HTML.encode())
    assert metadata == {"title": "The harbour"}
    assert text.startswith("# Harbour\n\nThe **lighthouse** was built in 1871.\n\n## Keepers")
    assert "Anna Berg" in text
    assert "| 1900 | 17 |" in text
    assert not {"alert", "color", "Home"} & set(text.replace("(", " ").replace(" {", " ").split())
    # the page names its encoding
    latin = '<meta charset="iso-8859-1"><p>Blåbærsyltetøy</p>'.encode("latin-1")
    assert read(tmp_path, "b.htm", latin)[0] == "Blåbærsyltetøy"


def test_docx_epub_and_pdf(tmp_path):
    docx = docx_bytes(("Heading1", "Harbour"), ("Normal", "The lighthouse was built in 1871."))
    assert read(tmp_path, "a.docx", docx) == ("# Harbour\n\nThe lighthouse was built in 1871.", {})
    assert read(tmp_path, "b.epub", archive(EPUB)) == (
        "# First\n\nIt begins.\n\n# Second\n\nIt ends.",
        {"title": "A book"},
    )
    assert read(tmp_path, "c.pdf", pdf_bytes("The ferry leaves at noon.")) == (
        "The ferry leaves at noon.",
        {"pages": [0]},
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("Blåbær".encode(), "Blåbær"),
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        ("utf-16 mit Ümlaut".encode("utf-16"), "utf-16 mit Ümlaut"),
        ("le café du port est fermé à midi".encode("latin-1"), "le café du port est fermé à midi"),
        ("“quoted” – and more".encode("cp1252"), "“quoted” – and more"),
        ("Маяк построили в 1871 году на северном мысе, и смотритель жил там.".encode("cp1251"),
         "Маяк построили в 1871 году на северном мысе, и смотритель жил там."),
        ("灯台は千八百七十一年に北の岬に建てられました。漁師たちは喜びました。".encode("shift_jis"),
         "灯台は千八百七十一年に北の岬に建てられました。漁師たちは喜びました。"),
    ],
    ids=["utf-8", "mark", "utf-16", "latin-1", "cp1252", "cp1251", "shift_jis"],
)  # fmt: skip
def test_the_encoding_of_a_text_is_found(data, text):
    assert decode_text(data) == text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("photo.jpg", b"\xff\xd8\xff\xe0", "files of the kind '.jpg' are not read, only .txt"),
        ("noise.txt", bytes(range(256)) * 40, "binary data|no text in a known encoding"),
        ("old.docx", b"\xd0\xcf\x11\xe0" + bytes(600), "no readable docx file"),
        ("cut.epub", archive(EPUB)[:200], "no readable epub file"),
        ("cut.pdf", pdf_bytes("text")[:60], "no readable pdf file"),
        ("scan.pdf", pdf_bytes(""), "hold no text: scans need text recognition"),
        ("empty.epub", archive({"mimetype": "x"}), "no readable epub file"),
    ],
)
def test_what_cannot_be_read_is_skipped_and_says_why(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    report = ReadReport()
    documents = list(read_documents(find_files([tmp_path]), report))
    assert [document.id for document in documents] == ["good.txt"]
    assert list(report.skipped) == [name]
    with pytest.raises(ValueError, match=reason):
        read_file(tmp_path / name)


def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("xcllama.store.documents.MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(ValueError, match="unpacks to"):
        read(tmp_path, "a.epub", archive(EPUB | {"OPS/big.xhtml": "x" * 2000}))


def count(text: str) -> int:
    """Tokens are letters."""
    return len(text)


def assert_covers(text: str, spans: list[tuple[int, int]]) -> None:
    """Passages follow each other; between them stands white space only."""
    end = 0
    for start, stop in spans:
        assert 0 <= start < stop <= len(text)
        assert not text[end:start].strip()
        assert stop > end
        end = stop
    assert not text[end:].strip()


def test_passages_begin_at_headings_and_paragraphs():
    section = "## Part {0}\n\n" + "The keeper of light number {0} wrote a letter. " * 3 + "\n\n" + "He slept. " * 3
    text = "# Title\n\n" + "\n\n".join(section.format(number) for number in range(9))
    spans = split_passages(text, count)
    assert_covers(text, spans)
    assert all(text[start:].startswith("#") for start, _ in spans)
    assert all(100 <= stop - start <= 250 for start, stop in spans)


def test_a_sentence_that_must_be_cut_is_cut_between_words_and_its_end_repeated():
    text = " ".join(f"word{number}" for number in range(200))
    spans = split_passages(text, count)
    assert len(spans) > 5
    for (_, stop), (start, _) in zip(spans[:-1], spans[1:], strict=True):
        assert 0 < stop - start <= 30
        assert text[start - 1] == " "
        assert text[start:].startswith("word")
    # of sentences that end nothing is repeated
    sentences = "A sentence of some words stands here. " * 40
    spans = split_passages(sentences, count)
    assert all(stop <= start for (_, stop), (start, _) in zip(spans[:-1], spans[1:], strict=True))
    assert_covers(sentences, spans)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=1500))
def test_any_text_is_covered_by_passages_of_bounded_size(text):
    spans = split_passages(text, lambda part: len(part.encode()), (20, 40, 60))
    if len(text.encode()) <= 60:
        assert spans == [(0, len(text))]
    else:
        end = 0
        for start, stop in spans:
            assert not text[end:start].strip()
            assert len(text[start:stop].encode()) <= 60
            end = stop
        assert not text[end:].strip()


def test_hits_map_back_to_the_document_and_its_page(tmp_path, model):
    pages = [
        "The lighthouse was built by Anna. " * 9,
        "The ferry sails to Norway at noon. " * 9,
        "Potatoes grow. " * 20,
    ]
    text, starts = "", []
    for page in pages:
        starts.append(len(text))
        text += page + "\r\n\r\n"
    text = "\ufeff" + text
    with ContextStore(tmp_path, model, ByteProcessor()) as store:
        store.add("book.pdf", text, {"pages": [start + 1 for start in starts]})
        assert store.stats()["passages"] > 3
        for word, page in (("Anna", 1), ("Norway", 2), ("potatoes", 3)):
            hit = store.search(word)[0]
            assert (hit.id, hit.page) == ("book.pdf", page)
            assert hit.text == text[hit.start : hit.stop] == store.text("book.pdf")[0][hit.start : hit.stop]
            assert store.get(hit).row_token_ids(0).tolist() == list(hit.text.encode())
        whole = store.get("book.pdf")
        assert len(whole) == 1
        assert len(whole.rows[0]) == store.stats()["passages"]
