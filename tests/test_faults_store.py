"""A store serves what it was given or refuses: states that are not finite, counts, texts; a read costs what it is."""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_support import ByteProcessor, TableModel, model, row_states, store, whole_store

from xcllama.store import ContextStore, pull
from xcllama.store.manifest import Manifest

SHA = "0" * 64


@pytest.fixture
def snapshot(tmp_path, model):
    """A snapshot of three documents."""
    with whole_store(tmp_path / "source", model) as store:
        store.add(["a", "b", "c"], ["one", "two", "three"])
        store.snapshot(tmp_path / "snapshot")
    return tmp_path / "snapshot"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_manifest_is_read_or_refused(data):
    """Any field, of the whole or of an entry, replaced by any JSON: a ValueError, or fields of the right types."""
    entry = {"name": "shards/a.safetensors", "nbytes": 1, "sha256": SHA, "header_checksum": "00"}
    part = {"name": "catalogue/a.parquet", "nbytes": 1, "sha256": SHA, "header_checksum": ""}
    fields = json.loads(Manifest("f", "{}", "float32", "1", "n", "m", 1, 2, [], []).to_json())
    fields |= {"shards": [entry], "catalogue": [part]}
    target = data.draw(st.sampled_from([fields, entry, part]))
    target[data.draw(st.sampled_from([*target, "another"]))] = data.draw(JSON)
    try:
        manifest = Manifest.from_json(json.dumps(fields), "here")
    except ValueError:
        return
    assert all(type(one.nbytes) is int and one.nbytes >= 0 and "/" not in one.file_name for one in manifest.files)
    assert type(manifest.documents) is int
    assert type(manifest.namespace) is str


def test_a_catalogue_that_names_other_places_is_refused(snapshot, tmp_path, monkeypatch):
    import xcllama.store.remote as remote

    rows = remote.pyarrow.parquet.read_table

    def changed(source):
        table = rows(source).to_pylist()
        table[1]["passages"][0]["stop"] = 99
        return type("Table", (), {"to_pylist": lambda self: table})()

    monkeypatch.setattr(remote.pyarrow.parquet, "read_table", changed)
    with pytest.raises(ValueError, match="passage of 'b' that is nowhere"):
        ContextStore.open(snapshot, cache_folder=tmp_path / "cache")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_states_that_are_not_finite_are_not_stored(tmp_path, model, value):
    model.table[ord("x"), 3] = value
    with whole_store(tmp_path, model) as store:
        store.add("good", "text without it".replace("x", "k"))
        with pytest.raises(ValueError, match="`hidden` has NaN or infinite values"):
            store.add(["b", "c"], ["x", "more"])
        assert store.ids() == ["good"]
        assert store.verify().damaged == []


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_dtype_that_cannot_hold_the_states_is_refused(tmp_path, dtype):
    model = TableModel(dtype=torch.float32)
    model.table[ord("x")] = 1e30
    with whole_store(tmp_path, model, dtype=dtype) as store:
        with pytest.raises(ValueError, match="infinite values in torch.float16|must lie within 65504"):
            store.add("a", "x")
        store.add("b", "y")
        assert row_states(store.get("b"), 0).isfinite().all()


def test_weights_that_change_while_a_store_is_open_are_refused(store, model):
    store.add("a", "before")
    model.fingerprint = "table-changed"
    with pytest.raises(ValueError, match="changed while the store was open.*table-0.*table-changed"):
        store.add("b", "after")
    model.fingerprint = "table-0"
    store.add("b", "after")
    assert store.verify().damaged == []
    assert {path.name for path in (store.folder / "shards").iterdir()} == {
        row[0] for row in store.catalogue.rows("SELECT name FROM shards")
    }


def test_states_of_another_layout_or_width_are_refused(store, model):
    store.add("a", "text")
    cache = store.get("a")
    wide = type(cache)({"hidden": torch.zeros(4, 8).bfloat16()}, (0, 4), torch.tensor([9, 8, 7, 6]).int(), "table-0")
    with pytest.raises(ValueError, match="holds states"):
        store.add_cache(["b"], ["b"], wide)
    assert store.get("a").states["hidden"].shape == (4, 16)
    assert store.ids() == ["a"]


@pytest.mark.parametrize("value", [True, 0, -1, 1.0, 2.5, "3", None, float("nan")])
def test_counts_are_counts(tmp_path, model, value):
    with whole_store(tmp_path / "s", model) as store:
        store.add("a", "text")
        with pytest.raises(ValueError, match="`k` must be a whole number of at least 1"):
            store.search("text", k=value)
        with pytest.raises(ValueError, match="`shard_bytes` must be"):
            whole_store(tmp_path / "t", model, shard_bytes=value)
        if value is not None:
            with pytest.raises(ValueError, match="`max_bytes` must be a whole number"):
                whole_store(tmp_path / "u", model, max_bytes=value)
    if value is not None and value not in (1.0, 2.5):
        with whole_store(tmp_path / "s", model) as store, pytest.raises(ValueError, match="`ttl` must be seconds"):
            store.add("b", "text", ttl=value)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((["a\ud800"], ["text"]), "id"),
        ((["a"], ["half \udc00 pair"]), "text"),
        ((["a"], ["t"], [{"k": "\ud83d"}]), "metadata"),
    ],
)
def test_lone_surrogates_are_named(store, arguments, what):
    with pytest.raises(ValueError, match=f"the {what} of document '.*' has a lone surrogate at character"):
        store.add(*arguments)
    assert len(store) == 0
    with pytest.raises(ValueError, match="has no document"):
        store.get("\ud800")
    assert store.search("\ud800") == []


SENTENCES = {
    "chinese": "我住在北京市中心，这里有很多人。",
    "thai": "พรุ่งนี้เราจะไปดูประภาคารสวยที่ทะเล",
    "japanese": "今日は友達としりとりをして遊びました。",
    "korean": "한국어 검색을 합니다",
    "khmer": "ខ្ញុំរស់នៅភ្នំពេញ",
    "hindi": "वह हिन्दी में लिखता है",
    "english": "The lighthouse was built in 1871.",
    "mixed": "The tower 東京タワー is red.",
}


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("北京", "chinese"),
        ("中心", "chinese"),
        ("人", "chinese"),
        ("北京在哪里", "chinese"),
        ("ประภาคาร", "thai"),
        ("しりとり", "japanese"),
        ("遊", "japanese"),
        ("검색", "korean"),
        ("ភ្នំពេញ", "khmer"),
        ("हिन्दी", "hindi"),
        ("東京タワー", "mixed"),
        ("タワー tower", "mixed"),
        ("lighthouses", "english"),
    ],
)
def test_words_are_found_in_every_script(store, query, found):
    store.add(SENTENCES.keys(), SENTENCES.values())
    assert store.search(query)[0].id == found


def test_a_request_costs_what_it_reads(tmp_path, model, monkeypatch):
    calls = []
    with whole_store(tmp_path, model, shard_bytes=50_000) as store:
        store.add([f"d{number}" for number in range(200)], [f"text {number} " * 20 for number in range(200)])
        assert store.stats()["shards"] > 5
        rows = store.catalogue.rows
        monkeypatch.setattr(store.catalogue, "rows", lambda *arguments: (calls.append(arguments), rows(*arguments))[1])
        for count in (1, 3):
            with store.request() as cost:
                cache = store.get([f"d{17 * number}" for number in range(count)])
            assert cache.offsets[-1] == sum(len(f"text {17 * number} " * 20) for number in range(count))
            assert cost.bytes_read == cache.offsets[-1] * 16 * 2
        # known shards: one query a document
        calls.clear()
        store.get(["d0", "d17", "d34"])
        assert len(calls) == 3
        # what is there is not even cut into tokens
        monkeypatch.setattr("xcllama.store.adding.tokenize", lambda *arguments: pytest.fail("tokenized"))
        assert store.add(["d1", "d2"], ["text 1 " * 20, "text 2 " * 20]).skipped == 2


def test_a_changed_paragraph_is_encoded_alone(tmp_path, model):
    paragraphs = [f"Paragraph {number} is about {number} lighthouses. " * 5 for number in range(12)]
    with ContextStore(tmp_path, model, ByteProcessor()) as store:
        store.add("a", "\n\n".join(paragraphs))
        first, passages = model.encoded, store.stats()["passages"]
        assert first == passages > 5
        paragraphs[4] = "Something else altogether. " * 8
        store.add("a", "\n\n".join(paragraphs))
        assert 0 < model.encoded - first <= 3
        # what was replaced is gone, and another name for the same text costs nothing
        assert store.stats()["tokens"] == sum(
            len(hit.text.encode()) for hit in store.search("lighthouses altogether", k=99)
        )
        encoded = model.encoded
        store.add("b", "\n\n".join(paragraphs))
        assert model.encoded == encoded
        store.evict("a")
        assert torch.equal(
            row_states(store.get(store.search("altogether")[0]), 0), model.states(store.search("altogether")[0].text)
        )


def test_nothing_is_held_while_many_documents_stream_in(tmp_path, model):
    """A generator of documents is taken a few at a time."""
    waiting, most = [0], [0]

    def texts():
        for number in range(2000):
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
            yield f"a text of its own, number {number}"

    with whole_store(tmp_path, model) as store:
        commit = store.catalogue.commit

        def counted(*arguments):
            waiting[0] = 0
            return commit(*arguments)

        store.catalogue.commit = counted
        store.add((f"d{number}" for number in range(2000)), texts())
    assert most[0] <= 300 < sys.maxsize


def test_a_pull_over_another_snapshot_leaves_its_files_alone(tmp_path, model):
    """Shards of which a part is published bear other names than whole ones; what a killed pull left goes."""
    places = [tmp_path / "one", tmp_path / "two"]
    with whole_store(tmp_path / "source", model) as store:
        store.add(["a", "b"], ["first text", "second text"])
        store.snapshot(places[0])
        store.add(["b"], ["another text"])
        store.snapshot(places[1])
    shards = [{path.name for path in (place / "shards").iterdir()} for place in places]
    assert shards[0].isdisjoint(shards[1])
    pull(places[0], tmp_path / "target")
    left = tmp_path / "target" / "shards" / next(iter(shards[0]))
    content = left.read_bytes()
    pull(places[1], tmp_path / "target")
    # as if the pull had been killed before it removed what it replaced
    left.write_bytes(content)
    pull(places[1], tmp_path / "target")
    assert {path.name for path in (tmp_path / "target" / "shards").iterdir()} == shards[1]
    with ContextStore.open(tmp_path / "target", model, ByteProcessor(), cache_folder=tmp_path / "cache") as store:
        assert store.verify().damaged == []
        assert len(store) == 2
