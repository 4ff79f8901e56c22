"""Snapshots: published, pulled, served read-only from a folder, from S3 and by range."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from store_support import ByteProcessor, TableModel, row_states, whole_store

from xcllama.store import ContextStore, DamagedDocumentError, pull
from xcllama.store.manifest import Folder
from xcllama.store.remote import merge_spans

DOCUMENTS = {f"döc {i}": f"document number {i} about lighthouses " * (1 + i % 4) for i in range(40)}


@pytest.fixture
def model():
    return TableModel()


@pytest.fixture
def snapshot(tmp_path, model):
    """A snapshot of several shards, one of them with dead documents."""
    with whole_store(tmp_path / "s", model, shard_bytes=20_000, namespace="demo") as store:
        store.add(DOCUMENTS.keys(), DOCUMENTS.values(), [{"number": i} for i in range(40)])
        store.add(["gone"], ["removed before publication"])
        store.add(["döc 1"], ["a changed text"])
        store.evict("gone")
        manifest = store.snapshot(tmp_path / "snap", title="Lighthouses", license_id="cc0-1.0")
    assert manifest.documents == 40
    assert len(manifest.shards) > 3
    return tmp_path / "snap"


EXPECTED = DOCUMENTS | {"döc 1": "a changed text"}


def assert_serves(store, model) -> None:
    ids = list(EXPECTED)[::-1]
    cache = store.get(ids)
    for row, name in enumerate(ids):
        assert torch.equal(row_states(cache, row), model.states(EXPECTED[name]))
    assert [hit.id for hit in store.search("changed")] == ["döc 1"]
    assert [hit.id for hit in store.search("lighthouses", where={"number": 7})] == ["döc 7"]
    assert "gone" not in store


def test_a_local_snapshot_is_served_without_a_copy(snapshot, tmp_path, model):
    with ContextStore.open(snapshot, model, ByteProcessor(), cache_folder=tmp_path / "cache") as store:
        assert_serves(store, model)
        assert store.metrics.total.bytes_fetched == 0
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        with pytest.raises(ValueError, match="read-only"):
            store.add("a", "text")
    card = (snapshot / "README.md").read_text()
    assert "license: cc0-1.0" in card
    assert "# Lighthouses" in card
    manifest = json.loads((snapshot / "manifest.json").read_text())
    # the dead documents were left behind
    names = {entry["name"] for entry in manifest["shards"]}
    assert names == {f"shards/{path.name}" for path in (snapshot / "shards").iterdir()}
    assert manifest["tokens"] == sum(len(text.encode()) for text in EXPECTED.values())


def test_another_model_or_a_newer_format_is_refused(snapshot, tmp_path):
    with pytest.raises(ValueError, match=r"table-0.*table-1"):
        ContextStore.open(snapshot, TableModel(1), ByteProcessor(), cache_folder=tmp_path / "cache")
    path = snapshot / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(ValueError, match="this code reads 'xcllama-context-snapshot' version 2"):
        ContextStore.open(snapshot, cache_folder=tmp_path / "cache")
    path.write_text("{")
    with pytest.raises(ValueError, match="no snapshot's manifest"):
        ContextStore.open(snapshot, cache_folder=tmp_path / "cache")


def test_publishing_twice_and_damage(snapshot, tmp_path, model):
    with whole_store(tmp_path / "s", model, namespace="demo") as store:
        with pytest.raises(ValueError, match="overwrite=True"):
            store.snapshot(snapshot)
        store.snapshot(snapshot, overwrite=True)
        path = next((store.folder / "shards").iterdir())
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
        with pytest.raises(ValueError, match="damaged"):
            store.snapshot(tmp_path / "other")
    assert not (tmp_path / "other" / "manifest.json").exists()
    with ContextStore.open(snapshot, model, ByteProcessor(), cache_folder=tmp_path / "cache") as store:
        assert store.verify().damaged == []


def test_an_altered_snapshot_is_reported(snapshot, tmp_path, model):
    shard = next((snapshot / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with ContextStore.open(snapshot, model, ByteProcessor(), cache_folder=tmp_path / "cache") as store:
        (damaged,) = store.verify().damaged
        with pytest.raises(DamagedDocumentError, match=damaged):
            store.get(damaged)
    with pytest.raises(ValueError, match="SHA-256"):
        pull(str(snapshot), tmp_path / "copy")
    part = next((snapshot / "catalogue").iterdir())
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(ValueError, match="SHA-256"):
        ContextStore.open(snapshot, model, ByteProcessor(), cache_folder=tmp_path / "cache2")


def test_pull_copies_and_continues(snapshot, tmp_path, model):
    pull(str(snapshot), tmp_path / "copy")
    kept = next((tmp_path / "copy" / "shards").iterdir())
    before = kept.stat().st_mtime_ns
    lost = next((tmp_path / "copy" / "catalogue").iterdir())
    lost.unlink()
    pull(str(snapshot), tmp_path / "copy")
    assert kept.stat().st_mtime_ns == before
    with ContextStore.open(tmp_path / "copy", model, ByteProcessor(), cache_folder=tmp_path / "cache") as store:
        assert_serves(store, model)


def test_ranges_into_a_bounded_cache(snapshot, tmp_path, model):
    """fsspec's memory file system stands for any remote one."""
    url = "memory://bucket/snap"
    Folder(url).fs.put(str(snapshot), "/bucket/snap", recursive=True)
    options = {"cache_folder": tmp_path / "cache"}
    with ContextStore.open(url, model, ByteProcessor(), **options) as store:
        ids = [hit.id for hit in store.search("lighthouses", where={"number": [3, 4]})]
        store.get(ids)
        few = store.metrics.total.bytes_fetched
        states = sum(len(EXPECTED[name]) for name in ids) * (16 * 2 + 4)
        assert states <= few <= states + 2 * 2048
        store.get(ids)
        # nothing is fetched again
        assert store.metrics.total.bytes_fetched == few
        assert_serves(store, model)
        assert few < store.metrics.total.bytes_fetched <= store._source.manifest.nbytes
    # what was fetched is still there in another process or after a restart
    with ContextStore.open(url, model, ByteProcessor(), **options) as store:
        assert_serves(store, model)
        assert store.metrics.total.bytes_fetched == 0
    # a file takes a block
    bound = 10 * 4096
    assert bound < store._source.manifest.nbytes
    with ContextStore.open(url, model, ByteProcessor(), **options, cache_bytes=bound) as store:
        shutil.rmtree(store._source.ranges)
        store._source.ranges.mkdir()
        for _ in range(2):
            for name in EXPECTED:
                assert torch.equal(row_states(store.get(name), 0), model.states(EXPECTED[name]))
                assert sum(file.stat().st_blocks * 512 for file in store._source.ranges.iterdir()) <= bound
        view = store.get(list(EXPECTED))
        assert torch.equal(row_states(view, 5), model.states(list(EXPECTED.values())[5]))


def test_a_damaged_range_is_not_served(snapshot, tmp_path, model):
    url = "memory://bucket/bad"
    shard = max((snapshot / "shards").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    Folder(url).fs.put(str(snapshot), "/bucket/bad", recursive=True)
    with ContextStore.open(url, model, ByteProcessor(), cache_folder=tmp_path / "cache") as store:
        (damaged,) = store.verify().damaged
        with pytest.raises(DamagedDocumentError, match=damaged):
            store.get(damaged)
        Folder(url).fs.rm(f"/bucket/bad/shards/{shard.name}")
        store._reader.forget(1)
        assert len(store.verify().damaged) >= 1


def test_merge_spans():
    assert merge_spans([(5, 9), (0, 5), (12, 12), (20, 30), (25, 28)]) == [(0, 9), (20, 30)]


def test_a_snapshot_on_s3(tmp_path, model, bucket):
    storage = {"skip_instance_cache": True}
    with whole_store(tmp_path / "s", model, shard_bytes=20_000, namespace="demo") as store:
        store.add(EXPECTED.keys(), EXPECTED.values(), [{"number": i} for i in range(40)])
        store.snapshot(f"{bucket}/lighthouses", storage_options=storage)
    options = {"storage_options": storage, "cache_folder": tmp_path / "cache"}
    with ContextStore.open(f"{bucket}/lighthouses", model, ByteProcessor(), **options) as store:
        store.get("döc 3")
        assert 0 < store.metrics.total.bytes_fetched < store._source.manifest.nbytes // 2
        assert_serves(store, model)
        assert store.verify().damaged == []
    pull(f"{bucket}/lighthouses", tmp_path / "copy", storage)
    with ContextStore.open(tmp_path / "copy", model, ByteProcessor(), cache_folder=tmp_path / "cache2") as store:
        assert_serves(store, model)
