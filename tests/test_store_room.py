"""A bounded store: eviction, pins, time to live, handles, and shards that are rewritten."""

import time
from pathlib import Path

import pytest
from store_support import ByteProcessor, TableModel, assert_states, model, row_states, store, whole_store

from xcllama.store import ContextStore, MissingDocumentError


def shard_bytes_on_disk(store) -> int:
    return sum(path.stat().st_size for path in (store.folder / "shards").iterdir())


def test_a_bounded_store_evicts_the_least_recently_used_and_keeps_pinned(tmp_path, model):
    limit = 200_000
    with whole_store(tmp_path, model, max_bytes=limit) as store:
        text = "x" * 500
        store.add(["pinned"], [text])
        store.add(["used"], [text + "used"])
        handle = store.pin("pinned")
        for i in range(60):
            store.add([f"d{i}"], [text + str(i)])
            store.get("used")
            assert shard_bytes_on_disk(store) <= limit
        assert "pinned" in store
        assert "used" in store
        assert "d59" in store
        assert "d0" not in store
        assert store.stats()["evictions"] > 20
        # most of the room is used: documents are not thrown away by the shard
        assert store.stats()["state_bytes"] > limit // 2
        survivors = [f"d{i}" for i in range(60) if f"d{i}" in store]
        assert survivors == [f"d{i}" for i in range(60 - len(survivors), 60)]
        with pytest.raises(ValueError, match="pinned"):
            store.evict("pinned")
        handle.release()
        store.evict(max_bytes=0)
        assert len(store) == 0
        assert shard_bytes_on_disk(store) == 0
    with whole_store(tmp_path, model) as store:
        assert store.max_bytes == limit


def test_room_that_pins_hold_is_not_taken(tmp_path, model):
    with whole_store(tmp_path, model, max_bytes=100_000) as store:
        store.add(["a"], ["x" * 2000])
        with store.pin(["a"]), pytest.raises(ValueError, match="pinned"):
            store.add(["b"], ["y" * 1500])
        assert_states(store, model, {"a": "x" * 2000})
        store.add(["b"], ["y" * 1500])
        assert "a" not in store
        assert shard_bytes_on_disk(store) <= 100_000


def test_big_shards_are_rewritten_without_their_dead(tmp_path, model):
    with whole_store(tmp_path, model, max_bytes=400_000) as store:
        names = [f"d{i}" for i in range(40)]
        store.add(names, ["z" * 200 + name for name in names])
        # every second one stays in use, so no shard dies whole
        for step in range(12):
            store.get(names[::2])
            store.add([f"n{step}"], ["n" * 800 + str(step)])
            assert shard_bytes_on_disk(store) <= 400_000
        assert all(name in store for name in names[::2])
        assert_states(store, model, {name: "z" * 200 + name for name in names[::2]})
        assert store.verify().damaged == []


def test_time_to_live_of_documents_and_handles(tmp_path, model, monkeypatch):
    store = whole_store(tmp_path, model)
    store.add(["short"], ["soon gone"], ttl=100)
    store.add(["long"], ["stays here"])
    handle = store.pin(["long"], ttl=50)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 60)
    assert store.evict("long") == 1
    assert "short" in store
    monkeypatch.setattr(time, "time", lambda: now + 101)
    assert "short" not in store
    assert store.search("gone") == []
    with pytest.raises(MissingDocumentError):
        store.get("short")
    with pytest.raises(MissingDocumentError):
        store.pin("short")
    assert store.evict() == 1
    assert store.stats()["documents"] == 0
    handle.release()


def test_handles_outlive_their_process(tmp_path, model):
    store = whole_store(tmp_path, model)
    store.add(["a"], ["text"])
    handle = store.pin("a")
    other = whole_store(tmp_path, model)
    with pytest.raises(ValueError, match="pinned"):
        other.evict("a")
    assert handle.get().lengths == [4]
    other.release(handle.token)
    assert other.evict("a") == 1


def test_compact_joins_small_shards_and_drops_the_dead(store, model):
    documents = {f"d{i}": f"text {i}" for i in range(12)}
    for name, text in documents.items():
        store.add(name, text)
    store.evict([f"d{i}" for i in range(0, 12, 3)])
    reader = ContextStore(store.path, read_only=True)
    rest = {name: text for i, (name, text) in enumerate(documents.items()) if i % 3}
    assert_states(reader, model, rest)
    assert store.stats()["shards"] == 8
    assert store.compact() > 0
    assert store.stats()["shards"] == 1
    assert len(list((store.folder / "shards").iterdir())) == 1
    assert_states(reader, model, rest)
    assert_states(store, model, rest)
    assert model.encoded == 12
