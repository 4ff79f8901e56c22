"""Builds: the same rows whatever the number of workers, read back by `datasets`, never half a folder."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_builders import FEATURES, Report, Settings, make_row, read_source, validate_row
from dataset_builders.building import (
    SplitWriter,
    build_mix_folder,
    build_source,
    built_rows,
    finished_folder,
    read_table,
)
from dataset_builders.tasks import TASK_WEIGHTS

REPOSITORY = Path(__file__).resolve().parents[1]
FIXTURES = REPOSITORY / "tests" / "fixtures"


def squad_file(folder: Path, articles: int) -> str:
    """A file in the official format with two questions an article, one unanswerable."""
    data = []
    for number in range(articles):
        context = f"Town {number} has {number + 3} bridges, and its river is the {'ABC'[number % 3]}."
        questions = [
            {"id": f"{number}-a", "question": "How many bridges are there?", "is_impossible": False,
             "answers": [{"text": str(number + 3), "answer_start": context.index(f" {number + 3} ") + 1}]},
            {"id": f"{number}-b", "question": "Who built them?", "is_impossible": True, "answers": []},
        ]  # fmt: skip
        data.append({"title": f"Town_{number}", "paragraphs": [{"context": context, "qas": questions}]})
    path = folder / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return str(path)


def test_workers_change_neither_rows_nor_fingerprint(tmp_path):
    path = squad_file(tmp_path, articles=150)
    tables = [build_source("squad_v2", str(tmp_path / f"out{n}"), path, num_proc=n) for n in (1, 3)]
    assert tables[0]["configs"] == tables[1]["configs"]
    splits = tables[0]["configs"]["squad_v2"]["splits"]
    assert set(splits) == {"train", "validation", "test"}
    assert sum(counts["rows"] for counts in splits.values()) == 300
    for split in splits:
        one, three = (list(built_rows(f"{tmp_path}/out{n}/squad_v2", split, splits)) for n in (1, 3))
        assert one == three == list(read_source("squad_v2", path, split=split))


def test_workers_report_errors_and_drops_like_one_process(tmp_path):
    path = squad_file(tmp_path, articles=80)
    text = Path(path).read_text().replace('"id": "40-b"', '"id": 40')
    Path(path).write_text(text)
    messages, reports = [], []
    for num_proc in (1, 2):
        with pytest.raises(
            ValueError, match=r"record 41 \(line 1\): `paragraphs\[0\].qas\[1\].id` must be a string"
        ) as error:
            list(read_source("squad_v2", path, split="all", on_error="raise", num_proc=num_proc))
        messages.append(str(error.value))
        reports.append(Report())
        rows = list(read_source("squad_v2", path, "all", on_error="drop", report=reports[-1], num_proc=num_proc))
        assert len(rows) == 159
    assert messages[0] == messages[1]
    assert reports[0] == reports[1] == Report(160, 159, {"error: `paragraphs[].qas[].id` must be a string": 1})


def test_all_questions_on_a_document_fall_in_one_split(tmp_path):
    path = squad_file(tmp_path, articles=200)
    rows = {split: list(read_source("squad_v2", path, split=split)) for split in ("train", "validation", "test")}
    titles = {split: {row["titles_list"][0] for row in found} for split, found in rows.items()}
    assert sum(map(len, titles.values())) == 200 == len(set.union(*titles.values()))
    assert sum(map(len, rows.values())) == 400
    assert 150 < len(titles["train"]) < 198
    other_seed = list(read_source("squad_v2", path, split="test", seed=9))
    assert {row["titles_list"][0] for row in other_seed} == titles["test"]


def test_a_folder_reads_back_with_its_features(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    build_source("squad_v2", str(tmp_path / "out"), str(FIXTURES / "squad_v2.json"))
    read = datasets.load_dataset(str(tmp_path / "out"), streaming=True)
    assert read["train"].features == FEATURES
    rows = [row for split in read.values() for row in split]
    assert all(validate_row(row) for row in rows)
    by_id = {row["sample_idx"]: row for row in rows}
    assert by_id == {r["sample_idx"]: r for r in read_source("squad_v2", str(FIXTURES / "squad_v2.json"), "all")}


def test_other_filesystems(tmp_path):
    table = build_source("squad_v2", "memory://builds/one", str(FIXTURES / "squad_v2.json"))
    assert read_table("memory://builds/one") == table
    splits = table["configs"]["squad_v2"]["splits"]
    rows = list(built_rows("memory://builds/one/squad_v2", "all", splits))
    assert len(rows) == 3
    with pytest.raises(ValueError, match="`output` must be a new or empty folder"):
        build_source("squad_v2", "memory://builds/one", str(FIXTURES / "squad_v2.json"))


def test_an_interrupted_build_leaves_nothing_that_looks_finished(tmp_path):
    path = squad_file(tmp_path, articles=30)
    Path(path).write_text(Path(path).read_text()[:-40])
    with pytest.raises(ValueError, match="is not JSON"):
        build_source("squad_v2", str(tmp_path / "out"), path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["squad.json"]
    with pytest.raises(ValueError, match="is not JSON"):
        build_source("squad_v2", "memory://builds/broken", path)
    with pytest.raises(ValueError, match="not a finished build"):
        read_table("memory://builds/broken")


def test_a_killed_build_leaves_no_output(tmp_path):
    script = f"""
import os, signal
from dataset_builders.tasks import TASK_WEIGHTS
from dataset_builders.building import finished_folder
with finished_folder({str(tmp_path / "out")!r}) as folder:
    open(folder + "/train-00000.parquet", "w").write("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path)
    assert done.returncode < 0
    assert not (tmp_path / "out").exists()
    # and the next build is not in its way
    build_source("squad_v2", str(tmp_path / "out"), str(FIXTURES / "squad_v2.json"))
    assert read_table(str(tmp_path / "out"))["name"] == "squad_v2"


def test_outputs_are_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with (
        pytest.raises(ValueError, match="`output` must be a new or empty folder"),
        finished_folder(str(tmp_path / "out")),
    ):
        pass
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_shards_keep_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset_builders.building.SHARD_BYTES", 1)
    monkeypatch.setattr("dataset_builders.building._GROUP_ROWS", 4)
    rows = [make_row("rows", str(number), "Why?", [f"Text {number}."], ["Because"]) for number in range(10)]
    writer = SplitWriter(str(tmp_path), "train")
    for row in rows:
        writer.write(row)
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"train-0000{n}.parquet" for n in range(3)]
    assert list(built_rows(str(tmp_path), "train", {"train": writer.table()})) == rows


any_text = st.text(st.characters(codec="utf-8"), max_size=20)
texts = any_text.map(lambda text: text if text.strip() else f"x{text}")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(texts, any_text), min_size=1, max_size=4),
    texts,
    st.lists(texts.filter(lambda text: text != "UNANSWERABLE"), max_size=3),
    st.lists(st.tuples(texts, texts), max_size=2),
)
def test_rows_survive_parquet_and_json_lines(tmp_path_factory, contexts, question, answers, history):
    folder = tmp_path_factory.mktemp("round")
    row = make_row(
        "rows",
        "a",
        question,
        [text for text, _ in contexts],
        answers,
        [title for _, title in contexts],
        history=history,
    )
    validate_row(row)
    writer = SplitWriter(str(folder), "train")
    writer.write(row)
    writer.close()
    assert list(read_source("rows", f"{folder}/train-00000.parquet", split="all")) == [row]
    (folder / "rows.jsonl").write_text(json.dumps(row))
    assert list(read_source("rows", f"{folder}/rows.jsonl", split="all")) == [row]


def test_a_mix_folder_has_every_source_and_the_mix(tmp_path):
    paths = {
        "squad_v2": squad_file(tmp_path, articles=60),
        "hotpotqa": str(FIXTURES / "hotpotqa_distractor.json"),
        "repliqa": str(FIXTURES / "repliqa.jsonl"),
    }
    names, benchmarks, settings = ["squad_v2", "hotpotqa"], ["repliqa"], Settings(num_copies=2)
    table = build_mix_folder(str(tmp_path / "mix"), names, paths, benchmarks, settings)
    again = build_mix_folder(str(tmp_path / "again"), names, paths, benchmarks, settings, num_proc=2)
    assert table["configs"] == again["configs"]
    assert list(table["configs"]) == ["squad_v2", "hotpotqa", "repliqa", "mix", "tasks"]
    assert table["configs"]["hotpotqa"]["kept"] == 2
    mixed = list(built_rows(f"{tmp_path}/mix/mix", "all", table["configs"]["mix"]["splits"]))
    assert sum(row["dataset"] == "hotpotqa" for row in mixed) == 2
    assert sum(counts["read"] for counts in table["configs"]["mix"]["removal"].values()) == 122
    examples = list(built_rows(f"{tmp_path}/mix/tasks", "all", table["configs"]["tasks"]["splits"]))
    train = built_rows(f"{tmp_path}/mix/mix", "train", table["configs"]["mix"]["splits"])
    assert [row["sample_idx"] for row in examples] == [row["sample_idx"] for row in train]
    assert {row["question_type"] for row in examples} <= TASK_WEIGHTS.keys()
    assert table["configs"]["tasks"]["weights"] == TASK_WEIGHTS
    card = (tmp_path / "mix" / "README.md").read_text()
    assert "question_answering 0.3, " in card
    assert "| repliqa | 1 | 0 | 0 |" in card


def test_the_script_says_what_is_wrong(tmp_path):
    script = str(REPOSITORY / "scripts" / "build_dataset.py")
    for arguments, message in [
        (["--source", "squad_v2", "--path", "no.json"], "error: no.json: does not exist"),
        (["--source", "mix", "--path", "train.json"], "--path of a mix must be SOURCE=PATH"),
    ]:
        command = [sys.executable, script, *arguments, "--output", "out"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1
        assert message in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_s3_in_and_out(tmp_path, bucket):
    with fsspec.open(f"{bucket}/in/repliqa-0.jsonl.gz", "wb") as stream:
        stream.write(gzip.compress((FIXTURES / "repliqa.jsonl").read_bytes()))
    table = build_source("repliqa", f"{bucket}/out", f"{bucket}/in/*.jsonl.gz")
    local = build_source("repliqa", str(tmp_path / "out"), str(FIXTURES / "repliqa.jsonl"))
    splits = table["configs"]["repliqa"]["splits"]
    assert splits == local["configs"]["repliqa"]["splits"]
    assert read_table(f"{bucket}/out") == table
    assert [row["answer"] for row in built_rows(f"{bucket}/out/repliqa", "test", splits)] == [
        "A flood.",
        "UNANSWERABLE",
    ]
    with pytest.raises(ValueError, match="`output` must be a new or empty folder"):
        build_source("repliqa", f"{bucket}/out", f"{bucket}/in/*.jsonl.gz")
