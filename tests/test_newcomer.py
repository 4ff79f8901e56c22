"""The folder and the counts of `make newcomer`: every file is read or named, facts stand in it, verdicts are right."""

import importlib
from pathlib import Path

import pytest

from xcllama.documents import ReadReport, find_files, read_documents
from xcllama.evaluation.metrics import normalize_answer

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def newcomer(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("newcomer")


def test_the_mixed_folder_is_read_and_holds_the_answers(newcomer, tmp_path):
    files = importlib.import_module("newcomer_files")
    files.make_files(tmp_path / "files", words=2_000)
    report = ReadReport()
    texts = {one.id: one.text for one in read_documents(find_files([tmp_path / "files"]), report)}
    assert sorted(texts) == ["bakery.html", "clock.md", "ferry.txt", "log.txt", "minutes.docx", "station.pdf"]
    assert sorted(report.skipped) == ["data.txt", "photo.jpg"]
    assert report.empty == ["empty.txt"]
    assert "price" not in texts["bakery.html"]
    assert "Müllerin" in texts["ferry.txt"]
    assert len(texts["log.txt"].split()) >= 2_000
    everything = normalize_answer(" ".join(texts.values()))
    assert len(files.QUESTIONS) == 12
    for question, accepted in files.QUESTIONS:
        assert not accepted or any(normalize_answer(one) in everything for one in accepted), question


@pytest.mark.parametrize(
    ("found", "text", "accepted", "verdict"),
    [
        (True, "the four crowns.", ["4 crowns", "four crowns"], "right"),
        (True, "five", ["four"], "wrong"),
        (True, "Paris", [], "wrong"),
        (False, "not found", [], "declined"),
        (False, "not found", ["four"], "lost"),
    ],
)
def test_verdicts(newcomer, found, text, accepted, verdict):
    assert newcomer.verdict({"found": found, "text": text}, accepted) == verdict


def test_wrong_answers_that_are_sure_are_counted(newcomer):
    rows = [{"verdict": "wrong", "score": score, "seconds": 1.0} for score in (0.4, 0.9)]
    totals = newcomer.totals([*rows, {"verdict": "right", "score": 0.9, "seconds": 2.0}])
    assert (totals["wrong"], totals["wrong_and_sure"], totals["right"], totals["of"]) == (2, 1, 1, 3)
