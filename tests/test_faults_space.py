"""What the Space's page enforces, its server enforces: before any work, whoever sends it."""

import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

gradio = pytest.importorskip("gradio", reason="the extra `space` is not installed")
sys.path.insert(0, str(ROOT / "space"))
import documents  # noqa: E402
from documents import MAX_FILE_BYTES, MAX_NAME_LETTERS, MAX_TEXT_LETTERS, DocumentError, clean, read_file  # noqa: E402
from handlers import Handlers  # noqa: E402
from page import build  # noqa: E402
from reader import MAX_QUESTION_LETTERS, Reader  # noqa: E402
from visitors import Visitors  # noqa: E402

REQUEST = SimpleNamespace(session_hash="visitor")


class Idle(Reader):
    """A reader that does no work: whatever would take time fails the test."""

    def __init__(self):
        self.bytes_per_token = {"context cache": 100.0, "text in the prompt": 1000.0}
        self.max_document_tokens = 16384

    def _length(self, *_):
        pytest.fail("tokenized")

    def _stream(self, *_):
        pytest.fail("computed")

    def encode(self, *_):
        pytest.fail("encoded")


@pytest.fixture
def handlers() -> Handlers:
    return Handlers(Idle(), Visitors())


@pytest.mark.parametrize("letters", [MAX_TEXT_LETTERS + 1, 10_000_000])
def test_pasted_texts(handlers, monkeypatch, letters):
    monkeypatch.setattr(documents, "_is_control", lambda _: pytest.fail("looked at a letter"))
    shown, *_ = handlers.add_text("name", "x" * letters, [], REQUEST, lambda *_: None)
    assert f"{letters:,} letters, more than {MAX_TEXT_LETTERS:,}" in shown


def test_names_of_pasted_texts(handlers):
    shown, *_ = handlers.add_text("n" * (MAX_NAME_LETTERS + 1), "text", [], REQUEST, lambda *_: None)
    assert f"A name may have {MAX_NAME_LETTERS} letters" in shown


@pytest.mark.parametrize("question", ["q" * (MAX_QUESTION_LETTERS + 1), "é" * 10_000_000, "", " ", None])
def test_questions(handlers, question):
    what = "A question may have 2,000 letters" if question and question.strip() else "Please type a question"
    (answer,) = handlers.ask(question, [], REQUEST)
    assert what in answer[1]
    (answer,) = handlers.ask_prompt(question, [], True, 1.0, REQUEST)
    assert what in answer[1]


def test_files(handlers, tmp_path):
    path = tmp_path / "large.txt"
    path.write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    with pytest.raises(DocumentError, match="a file may have 5 MB"):
        read_file(path, "large.txt")
    # small enough as a file, too long as a text
    path.write_bytes(b"x" * (MAX_TEXT_LETTERS + 1))
    shown, *_ = handlers.add_files([str(path)], [], REQUEST, lambda *_: None)
    assert "letters, more than" in shown
    assert not path.exists()


def test_nothing_at_all(handlers):
    for name, text in ((None, None), ("", ""), (None, " \n")):
        shown, *_ = handlers.add_text(name, text, [], REQUEST, lambda *_: None)
        assert "there is no text in it" in shown


def test_the_page_says_the_same(handlers):
    limits = {}
    for block in build(handlers).blocks.values():
        if isinstance(block, gradio.Textbox) and block.max_length is not None:
            limits[block.label] = block.max_length
    assert limits == {"Question": MAX_QUESTION_LETTERS, "Name": MAX_NAME_LETTERS, "Text": MAX_TEXT_LETTERS}


def test_texts_at_the_limit_pass():
    assert len(clean("x" * MAX_TEXT_LETTERS, "name")) == MAX_TEXT_LETTERS
