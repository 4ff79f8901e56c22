"""What may go wrong with a store: crashes, crowds, full disks, read-only folders, damaged shards."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from store_support import ByteProcessor, TableModel, row_states, whole_store

from xcllama.store import ContextStore, DamagedDocumentError, MissingDocumentError

CALLS = "openat,write,writev,pwrite64,ftruncate,fallocate,fsync,fdatasync,rename,renameat,renameat2"
SCRIPT = Path(__file__).with_name("store_processes.py")
KILL_TESTS = Path(__file__).resolve().parents[1] / "scripts" / "kill_tests.py"


@pytest.fixture(scope="module")
def run():
    """Run a role of store_processes.py in a new process; returns the JSON that it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, SCRIPT], text=True, env=environment, cwd="/", **pipes) as server:

        def call(*arguments):
            print(json.dumps([str(a) if isinstance(a, Path) else a for a in arguments]), file=server.stdin, flush=True)
            status, output = json.loads(server.stdout.readline())
            assert status == 0, output[-3000:]
            # among what is logged
            return json.loads(next((line for line in output.splitlines() if line[0] in "[{"), "null"))

        yield call
        server.stdin.close()


@pytest.fixture
def store(tmp_path):
    with whole_store(tmp_path / "s", TableModel()) as store:
        yield store


@pytest.mark.parametrize("kills", [32, pytest.param(400, marks=pytest.mark.slow)])
def test_writers_killed_at_random_lose_nothing_and_leave_nothing(kills):
    """Cache files, stores that grow and are compacted, and snapshots that are pulled; the script says more."""
    command = [sys.executable, KILL_TESTS, "--count", str(kills), "--seed", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for counts in json.loads(done.stdout).values():
        assert counts.pop("kills") == kills // 4
        # the writers were at work
        assert counts.pop("operations") > 0
        assert not any(counts.values())


def test_two_writers_and_eight_readers_at_once(run, tmp_path):
    results = run("crowd", tmp_path / "s", 4)
    assert not [result for result in results if "error" in result]
    model = TableModel()
    with whole_store(tmp_path / "s", model) as store:
        for own in results[:2]:
            assert len(own) > 3
            for name, text in own.items():
                assert torch.equal(row_states(store.get(name), 0), model.states(text))
        assert store.verify().damaged == []
    assert sum(result["reads"] for result in results[2:]) > 0


def test_a_shard_is_on_disk_before_the_catalogue_names_it(run, tmp_path, store):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    store.add("old", "an old document")
    store.close()
    with ThreadPoolExecutor() as pool:
        adding = pool.submit(run, "add_one", store.path)
        pid = Path(f"{store.path}.pid")
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        command = ["strace", "-f", "-y", "-e", f"trace={CALLS}", "-p", pid.read_text()]
        trace = subprocess.run(command, capture_output=True, text=True)
        adding.result()
    if "Operation not permitted" in trace.stderr:
        pytest.skip("this machine does not let strace attach")
    lines = [line for line in trace.stderr.splitlines() if str(store.path) in line]

    def position(pattern: str, after: int = 0) -> int:
        return next(i for i, line in enumerate(lines) if i >= after and re.search(pattern, line))

    written = max(i for i, line in enumerate(lines) if re.search(r"write.*shards/\.[^/]*>, ", line))
    synced = position(r"fsync\(\d+<.*shards/\.[^/]*\.partial>", written)
    renamed = position(r"rename.*\.partial\".*[0-9a-f]\.safetensors\"", synced)
    folder = position(r"fsync\(\d+<[^>]*/shards>\)", renamed)
    committed = position(r"pwrite64\(\d+<.*catalogue\.sqlite3-wal>", folder)
    durable = position(r"(fsync|fdatasync)\(\d+<.*catalogue\.sqlite3-wal>", committed)
    assert written < synced < renamed < folder < committed < durable
    assert not any(re.search(r"pwrite64.*catalogue", line) for line in lines[:folder])


def test_files_that_may_not_grow(run, tmp_path):
    result = run("full_disk", tmp_path / "s", 400_000)
    assert 0 < result["documents"] < result["steps"]
    with whole_store(tmp_path / "s", TableModel()) as store:
        assert store.verify().damaged == []
        store.add("after", "there is room again")
        assert len(list((store.folder / "shards").iterdir())) == store.stats()["shards"]


def test_a_full_file_system(run, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("this user cannot mount a small file system")
    try:
        result = run("full_disk", mount / "s", 0)
        assert 0 < result["documents"] < result["steps"]
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_folder_that_cannot_be_written_is_served(run):
    if os.geteuid() != 0:
        pytest.skip("needs root to become a user without rights")
    # pytest's own folders are closed to other users
    with tempfile.TemporaryDirectory() as open_to_all:
        folder = Path(open_to_all, "s")
        with whole_store(folder, TableModel()) as store:
            store.add("a", "a lighthouse")
        Path(open_to_all).chmod(0o755)
        result = run("read_only", folder)
    assert result["same"]
    assert result["hits"] == ["a"]
    assert len(result["refused"]) == 5
    assert all("read-only" in text or "read_only" in text for text in result["refused"])


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


def the_shard(store) -> Path:
    (path,) = (store.folder / "shards").iterdir()
    return path


@pytest.mark.parametrize("fresh", [True, False], ids=["before opening", "while open"])
def test_a_flipped_bit_is_reported_by_id_and_encoded_again(store, fresh):
    documents = {f"d{i}": f"document {i} " * 9 for i in range(5)}
    store.add(documents.keys(), documents.values())
    if not fresh:
        store.get(list(documents))
    part = store._reader.shard(1).parts["hidden"]
    start = sum(len(text) for text in list(documents.values())[:2])
    flip(the_shard(store), part.offset + start * part.token_bytes + 3)
    if fresh:
        store._reader.forget(1)
    with pytest.raises(DamagedDocumentError, match="'d2'") as caught:
        store.get(["d1", "d2", "d3"])
    assert caught.value.ids == ["d2"]
    # the others are still served
    assert store.get(["d1", "d3"]).lengths == [99, 99]
    assert store.verify().damaged == ["d2"]
    encoded = store.model.encoded
    assert store.repair() == ["d2"]
    assert store.model.encoded == encoded + 1
    assert torch.equal(row_states(store.get("d2"), 0), store.model.states(documents["d2"]))
    assert store.verify().damaged == []


def test_add_encodes_a_document_again_that_was_found_damaged(store):
    store.add(["a"], ["some text"])
    flip(the_shard(store), the_shard(store).stat().st_size - 1)
    assert store.verify().damaged == ["a"]
    assert store.add(["a"], ["some text"]).encoded == 1
    assert torch.equal(row_states(store.get("a"), 0), store.model.states("some text"))


@pytest.mark.parametrize("fresh", [True, False], ids=["before opening", "while open"])
@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_shard_cut_short_is_reported_and_never_touched(store, keep, fresh):
    store.add(["a", "b"], ["first text", "second text"])
    if not fresh:
        store.get(["a", "b"])
    path = the_shard(store)
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    with pytest.raises(DamagedDocumentError) as caught:
        store.get(["a", "b"])
    assert sorted(caught.value.ids) == ["a", "b"]
    report = store.verify(repair=True)
    assert sorted(report.damaged) == sorted(report.repaired) == ["a", "b"]
    assert torch.equal(row_states(store.get("b"), 0), store.model.states("second text"))
    assert not path.exists()


def test_a_header_bit_flip_and_a_lost_shard(store):
    store.add(["a"], ["text"])
    flip(the_shard(store), 30)
    with pytest.raises(DamagedDocumentError):
        store.get("a")
    store.repair()
    assert store.get("a").lengths == [4]
    the_shard(store).unlink()
    with pytest.raises(DamagedDocumentError):
        store.get("a")
    assert store.verify(repair=True).repaired == ["a"]


def test_damage_is_not_carried_into_a_compacted_shard(store):
    for name in "abc":
        store.add(name, f"text of {name}")
    path = store.folder / "shards" / store.catalogue.shard(2)[0]
    flip(path, path.stat().st_size - 1)
    store.compact()
    with pytest.raises(DamagedDocumentError, match="'b'"):
        store.get(["a", "b", "c"])
    assert store.get(["a", "c"]).lengths == [9, 9]
    assert store.repair() == ["b"]
    assert store.verify().damaged == []


def test_reading_races_with_eviction_and_compaction(tmp_path):
    model = TableModel()
    writer = whole_store(tmp_path, model)
    reader = ContextStore(tmp_path, read_only=True)
    writer.add(["a", "b"], ["one", "two"])
    view = reader.get(["a", "b"])
    writer.add(["b"], ["two changed"])
    writer.compact()
    # a view that was handed out stays what it was
    assert torch.equal(row_states(view, 1), model.states("two"))
    assert torch.equal(row_states(reader.get("b"), 0), model.states("two changed"))
    writer.evict("a")
    with pytest.raises(MissingDocumentError):
        reader.get("a")
