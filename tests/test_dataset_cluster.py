"""The build through datatrove: the rows of one machine, whatever the number of tasks; nothing is done twice."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the extra `cluster` is not installed")

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor

from dataset_builders import Report, read_source
from dataset_builders.building import build_source, built_rows, read_table
from dataset_builders.cluster import cluster_build, share
from dataset_builders.sources import get_source

REPOSITORY = Path(__file__).resolve().parents[1]


def lines(first: int, last: int) -> bytes:
    """RepLiQA records, each its own document, the rest of the fields as in the official files."""
    record = json.loads((REPOSITORY / "tests" / "fixtures" / "repliqa.jsonl").read_text().splitlines()[0])
    numbered = [
        record | {"document_id": f"d{n}", "question_id": f"q{n}", "document_extracted": f"Text number {n}."}
        for n in range(first, last)
    ]
    return b"".join(json.dumps(item).encode() + b"\n" for item in numbered)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        content = lines(number * 10, number * 10 + 10)
        (tmp_path / "in" / f"repliqa-{number}.jsonl.gz").write_bytes(gzip.compress(content))
    return tmp_path


def run(folder, tasks, work="work", output="out", **options):
    path = str(folder / "in" / "repliqa-*.jsonl.gz")
    build = cluster_build("repliqa", path, str(folder / output), str(folder / work), tasks, workers=1, **options)
    build.run()
    return read_table(str(folder / output))


@pytest.mark.parametrize("tasks", [1, 3, 7])
def test_tasks_build_what_one_machine_builds(folder, tasks):
    table = run(folder, tasks)["configs"]["repliqa"]
    alone = build_source("repliqa", str(folder / "alone"), str(folder / "in" / "repliqa-*.jsonl.gz"))
    expected = alone["configs"]["repliqa"]
    assert {name: table[name] for name in ("read", "kept", "dropped")} == {"read": 30, "kept": 30, "dropped": {}}
    splits = expected["splits"]
    assert table["splits"] == {"test": {"rows": 30, "content": splits["test"]["content"]}}
    rows = list(built_rows(f"{folder}/out/repliqa", "all", splits))
    assert sorted(row["sample_idx"] for row in rows) == sorted(f"q{n}" for n in range(30))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_shares_hold_every_record_once(folder, world_size):
    source, path = get_source("repliqa"), str(folder / "in" / "*.gz")
    found = [
        record.value()["question_id"]
        for rank in range(world_size)
        for record in share(source, path, rank, world_size, "raise", Report())
    ]
    assert sorted(found) == sorted(f"q{n}" for n in range(30))


def test_a_failed_build_is_resumed(folder):
    broken = folder / "in" / "repliqa-1.jsonl.gz"
    whole = broken.read_bytes()
    broken.write_bytes(gzip.compress(lines(10, 20) + b"{\n"))
    with pytest.raises(ValueError, match="line 11: `line` is not JSON"):
        run(folder, 3, on_error="raise")
    assert not (folder / "out").exists()
    done = sorted(path.name for path in (folder / "work" / "logs" / "rows" / "completions").iterdir())
    assert done == ["00000"]
    part = folder / "work" / "parts" / "00000" / "part.json"
    before = part.stat().st_mtime_ns
    broken.write_bytes(whole)
    assert run(folder, 3, on_error="raise")["configs"]["repliqa"]["kept"] == 30
    assert part.stat().st_mtime_ns == before


def test_drops_are_counted_once(folder):
    whole = (folder / "in" / "repliqa-1.jsonl.gz").read_bytes()
    (folder / "in" / "repliqa-1.jsonl.gz").write_bytes(whole[:-30])
    report = Report()
    rows = list(read_source("repliqa", str(folder / "in" / "*.gz"), "all", on_error="drop", report=report))
    # the files behind the broken one are read
    assert {"q0", "q29"} < {row["sample_idx"] for row in rows}
    assert 20 <= report.kept < 30
    for tasks in (1, 2, 5):
        table = run(folder, tasks, f"work{tasks}", f"out{tasks}", on_error="drop")["configs"]["repliqa"]
        assert table["dropped"] == report.dropped == {"error: truncated gzip": 1}
        assert (table["read"], table["kept"]) == (report.read, report.kept)


def test_the_work_folder_belongs_to_one_build(folder):
    run(folder, 2)
    with pytest.raises(ValueError, match="belongs to another build .tasks 2 -> 3"):
        run(folder, 3, output="other")
    with pytest.raises(ValueError, match="`output` must be a new or empty folder"):
        run(folder, 2)


def test_executors_can_be_chosen(tmp_path):
    common = ("repliqa", "in-*.jsonl.gz", str(tmp_path / "out"))
    slurm = cluster_build(*common, str(tmp_path / "a"), 50, "slurm", partition="cpu", time="04:00:00")
    assert isinstance(slurm, SlurmPipelineExecutor)
    assert (slurm.depends.tasks, slurm.tasks, slurm.depends.partition) == (50, 1, "cpu")
    ray = cluster_build(*common, str(tmp_path / "b"), 4, "ray")
    assert isinstance(ray, RayPipelineExecutor)
    assert isinstance(cluster_build(*common, str(tmp_path / "c"), 4), LocalPipelineExecutor)
    with pytest.raises(ValueError, match="`executor` must be one of local, slurm, ray, got 'spark'"):
        cluster_build(*common, str(tmp_path / "d"), 4, "spark")
    with pytest.raises(ValueError, match="`tasks` must be at least 1"):
        cluster_build(*common, str(tmp_path / "d"), 0)


def test_the_script_builds_with_several_processes(folder):
    script = str(REPOSITORY / "scripts" / "build_dataset_cluster.py")
    command = [sys.executable, script, "--source", "repliqa", "--path", "in/*.gz", "--output", "out", "--work", "work"]
    done = subprocess.run([*command, "--tasks", "2", "--workers", "2"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_table(str(folder / "out"))["configs"]["repliqa"]["kept"] == 30
