"""ContextStore on one machine: adding, reading, searching, pinning, evicting, namespaces."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from safetensors import safe_open
from store_support import ByteProcessor, TableModel, assert_states, model, row_states, store, whole_store

from xcllama.store import ContextStore, MissingDocumentError
from xcllama.store.search import match_expression


def test_documents_come_back_in_any_order_and_combination(store, model):
    documents = {f"d{i}": f"text number {i} " * (i + 1) for i in range(7)}
    report = store.add(documents.keys(), documents.values())
    assert (report.encoded, report.skipped) == (7, 0)
    assert report.tokens == sum(len(text) for text in documents.values())
    for ids in (["d3"], ["d6", "d0", "d3"], ["d1", "d1", "d2"]):
        cache = store.get(ids)
        for row, name in enumerate(ids):
            assert torch.equal(row_states(cache, row), model.states(documents[name]))
    joined = store.get(["d5", "d2"]).join([[0, 1], [1]])
    assert torch.equal(
        row_states(joined, 0), torch.cat([model.states(documents["d5"]), model.states(documents["d2"])])
    )


def test_a_restart_encodes_nothing_again(tmp_path, model):
    with whole_store(tmp_path / "s", model) as store:
        store.add(["a", "b"], ["one", "two"])
    again = TableModel()
    with whole_store(tmp_path / "s", again) as store:
        report = store.add(["a", "b", "c"], ["one", "two", "three"])
        assert (report.encoded, report.skipped, again.encoded) == (1, 2, 1)
        assert_states(store, model, {"c": "three", "a": "one", "b": "two"})


def test_a_changed_document_is_served_anew_at_once_in_every_process(tmp_path, model):
    writer = whole_store(tmp_path / "s", model)
    writer.add(["a"], ["old"])
    reader = ContextStore(tmp_path / "s", read_only=True)
    assert_states(reader, model, {"a": "old"})
    writer.add(["a"], ["new text"])
    assert_states(reader, model, {"a": "new text"})
    assert reader.search("old") == []
    assert [hit.id for hit in reader.search("text")] == ["a"]
    assert writer.stats()["shards"] == 1


def test_neighbours_are_views_of_the_mapped_shard_and_others_one_copy(store):
    store.add(["a", "b", "c", "d"], ["first", "second", "third", "fourth"])
    shard = store._reader.shard(1).tensors["hidden"]
    inside = range(shard.data_ptr(), shard.data_ptr() + shard.nbytes)
    for ids in (["b"], ["b", "c"], ["a", "b", "c", "d"]):
        assert store.get(ids).states["hidden"].data_ptr() in inside, ids
        assert store.get(ids).token_ids.data_ptr() not in inside
    for ids in (["a", "c"], ["c", "b"]):
        assert store.get(ids).states["hidden"].data_ptr() not in inside
    store.add(["e"], ["fifth"])
    assert store.get(["d", "e"]).states["hidden"].data_ptr() not in inside


@pytest.mark.parametrize("dtype", ["int8", "int4", "float32"])
def test_states_at_rest_in_other_dtypes(tmp_path, model, dtype):
    with whole_store(tmp_path / "s", model, dtype=dtype) as store:
        store.add(["a", "b", "c"], ["alpha", "beta", ""])
        expected = {"a": model.states("alpha").float(), "b": model.states("beta").float()}
        cache = store.get(["b", "c", "a"])
        assert str(cache.dtype) == f"torch.{dtype}"
        tolerance = {"int8": 0.02, "int4": 0.2, "float32": 0.0}[dtype]
        assert (row_states(cache, 0) - expected["b"]).abs().max() <= tolerance * expected["b"].abs().max()
        assert row_states(cache, 1).shape[0] == 0
        assert (row_states(cache, 2) - expected["a"]).abs().max() <= tolerance * expected["a"].abs().max()
    with pytest.raises(ValueError, match=f"holds {dtype} states"):
        whole_store(tmp_path / "s", model, dtype="bfloat16")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# `text` draws any Unicode but halves of surrogate pairs
@given(st.dictionaries(st.text(min_size=1, max_size=12), st.text(max_size=40)))
def test_ids_and_texts_of_any_unicode(tmp_path_factory, documents):
    model = TableModel()
    with whole_store(tmp_path_factory.mktemp("u"), model, namespace="näme/space ..") as store:
        store.add(documents.keys(), documents.values())
        assert len(store) == len(documents)
        if documents:
            assert_states(store, model, documents)
            assert store.verify().damaged == []


def test_a_slow_encoder_writes_shards_before_they_are_full(tmp_path, model, monkeypatch):
    monkeypatch.setattr("xcllama.store.adding.UNWRITTEN_SECONDS", -1.0)
    monkeypatch.setattr("xcllama.store.encoding.TOKENS_PER_CALL", {"cpu": 9})
    with whole_store(tmp_path, model) as store:

        def fail(texts):
            yield from ("first text", "second text")
            yield "x" * 9
            model.encode_context = None
            yield from texts

        with pytest.raises(TypeError):
            store.add([f"d{n}" for n in range(6)], fail(["never encoded", "texts", "at all"]))
    # what was written before the failure is there
    with ContextStore(tmp_path, read_only=True) as store:
        assert_states(store, TableModel(), {"d0": "first text", "d1": "second text", "d2": "x" * 9})
        assert store.stats()["shards"] == 3


def test_edges_of_add(store, model):
    report = store.add(["a", "a", "b"], ["first", "second", ""])
    assert report.encoded == 2
    assert_states(store, model, {"a": "second", "b": ""})
    long = "word " * 20_000
    store.add("long", long)
    assert store.get("long").lengths == [100_000]
    assert store.add([], []).encoded == 0
    with pytest.raises(ValueError, match="one entry a document"):
        store.add(["x", "y"], ["only one"])
    with pytest.raises(ValueError, match="lone surrogate at character 0"):
        store.add(["\ud800"], ["text"])
    with pytest.raises(ValueError, match="must be strings"):
        store.add([""], ["text"])
    with pytest.raises(MissingDocumentError, match="'x'"):
        store.get(["a", "x"])
    with pytest.raises(ValueError, match="at least one document"):
        store.get([])
    # what came before a failure in a stream is kept or not, but nothing is torn
    assert store.verify().damaged == []


def test_search_ranks_filters_and_quotes(store):
    texts = {
        "light": "The lighthouse on the cape was built by Anna Berg in 1871.",
        "ship": 'A ship passed the lighthouse. "NEAR" OR (AND) syntax* is text.',
        "farm": "Potatoes grow on the farm of the Berg family; the potatoes are good.",
    }
    store.add(texts.keys(), texts.values(), [{"place": "cape", "n": 1}, {"place": "sea"}, None])
    assert [hit.id for hit in store.search("who built the lighthouse?")][:1] == ["light"]
    assert [hit.id for hit in store.search("potato")] == ["farm"]
    assert "built by Anna" in store.search("Anna", k=1)[0].snippet
    assert [hit.id for hit in store.search("lighthouse", where={"place": "sea"})] == ["ship"]
    assert {hit.id for hit in store.search("lighthouse", where={"place": ["sea", "cape"]})} == {"ship", "light"}
    assert store.search("lighthouse", where={"n": 2}) == []
    for query in ('"', "NEAR(", "a* OR", "?!", "col:x", "'; DROP TABLE documents"):
        store.search(query)
    hits = store.search("lighthouse berg", k=3)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    with pytest.raises(ValueError, match="must be words"):
        store.search("  ")


def test_new_metadata_needs_no_encoding(store, model):
    store.add(["a"], ["text"], [{"version": 1}])
    assert store.add(["a"], ["text"], [{"version": 2}]).skipped == 1
    assert store.search("text")[0].metadata == {"version": 2}
    store.add(["a"], ["text"])
    assert store.search("text")[0].metadata == {"version": 2}
    assert model.encoded == 1


def test_namespaces_never_see_each_other(tmp_path, model):
    one = whole_store(tmp_path, model, namespace="one")
    two = whole_store(tmp_path, model, namespace="../one")
    one.add(["a"], ["secret lighthouse"])
    two.add(["a", "b"], ["other", "more"])
    assert two.search("lighthouse") == []
    assert "b" not in one
    two.evict(["a"])
    assert_states(one, model, {"a": "secret lighthouse"})
    with pytest.raises(MissingDocumentError):
        two.get("a")
    assert {path.parent.parent.name for path in tmp_path.rglob("*.safetensors")} == {"ns=one", "ns=..%2Fone"}
    with pytest.raises(ValueError, match="`namespace`"):
        whole_store(tmp_path, model, namespace="")


def test_another_model_template_or_format_is_refused(tmp_path, model):
    whole_store(tmp_path, model).close()
    with pytest.raises(ValueError, match=r"table-0.*table-1"):
        whole_store(tmp_path, TableModel(1))
    other = ByteProcessor()
    other.template_version = "2"
    with pytest.raises(ValueError, match=r"template version '1'.*'2'"):
        ContextStore(tmp_path, model, other)
    store = whole_store(tmp_path, model)
    store.catalogue.set_meta("format_version", "99")
    with pytest.raises(ValueError, match="99"):
        whole_store(tmp_path, model)
    (tmp_path / "x" / "ns=default").mkdir(parents=True)
    (tmp_path / "x" / "ns=default" / "catalogue.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="no context store"):
        ContextStore(tmp_path / "x", read_only=True)
    with pytest.raises(FileNotFoundError):
        ContextStore(tmp_path / "nowhere", read_only=True)


def test_counters_of_requests_and_totals_in_prometheus_form(store):
    store.add(["a", "b"], ["some text", "more text"])
    with store.request() as cost:
        store.search("text")
        store.get(["a", "b"])
        with pytest.raises(MissingDocumentError):
            store.get("c")
    assert (cost.hits, cost.misses, cost.bytes_read) == (2, 1, 18 * 16 * 2)
    assert cost.get_seconds > 0
    assert cost.search_seconds > 0
    store.get("a")
    families = {family.name: family for family in text_string_to_metric_families(store.prometheus())}
    assert families["xcllama_store_hits"].samples[0].value == 3
    assert families["xcllama_store_hits"].samples[0].labels == {"namespace": "default"}
    assert families["xcllama_store_documents"].samples[0].value == 2
    counts = {s.labels["operation"]: s.value for s in families["xcllama_store_seconds"].samples if "_count" in s.name}
    # the one that failed counts, too
    assert (counts["get"], counts["search"]) == (3, 1)
    assert json.dumps(store.stats())


def test_states_encoded_elsewhere(store, model):
    cache = model.encode_context(torch.tensor([[104, 105], [98, 99]]), torch.tensor([[1, 1], [1, 0]]))
    store.add_cache(["x", "y"], ["hi", "b"], cache)
    assert_states(store, model, {"y": "b", "x": "hi"})
    with pytest.raises(ValueError, match="table-1"):
        store.add_cache(["x"], ["hi"], TableModel(1).encode_context(torch.tensor([[1]]), torch.tensor([[1]])))
    with pytest.raises(ValueError, match="one row a document"):
        store.add_cache(["x"], ["hi"], cache)


def test_words_that_most_documents_have_are_left_out_of_large_searches(store, monkeypatch):
    texts = [f"common word{number} {'rare' if number == 7 else ''}" for number in range(30)]
    store.add([f"d{number}" for number in range(30)], texts)
    assert len(store.search("common rare", k=50)) == 30
    monkeypatch.setattr("xcllama.store.search.POSTINGS", 10)
    assert [hit.id for hit in store.search("common rare", k=5)] == ["d7"]
    # where there is nothing rarer they count, among the newest unless more is asked for
    assert {hit.id for hit in store.search("common", k=10)} == {f"d{number}" for number in range(20, 30)}
    assert len(store.search("common unheard", k=10)) == 10
    assert len(store.search("common", k=50)) == 30


def test_common_words_are_searched_together(store, monkeypatch):
    texts = [" ".join(f"w{n}" for n in (2, 3, 5) if number % n == 0) or "none" for number in range(120)]
    store.add([f"d{number}" for number in range(120)], texts, [{"half": number // 60} for number in range(120)])
    monkeypatch.setattr("xcllama.store.search.POSTINGS", 20)
    assert match_expression(store.catalogue, ['"w2"', '"w3"', '"w5"']) == '"w2" AND "w3" AND "w5"'
    assert {hit.id for hit in store.search("w2 w3 w5", k=20)} == {f"d{number}" for number in range(0, 120, 30)}
    # a filter looks at all of them
    assert {hit.id for hit in store.search("w2", k=20, where={"half": 0})} <= {f"d{number}" for number in range(60)}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_views_and_copies_are_exact(tmp_path, model, dtype):
    with whole_store(tmp_path, model, dtype=dtype) as store:
        documents = {"a": "first text", "b": "", "c": "the third", "d": "more"}
        store.add(documents.keys(), documents.values())
        copied = store.get(["d", "a", "b"])
        for row, name in enumerate("dab"):
            view = store.get(name)
            assert view.states.keys() == store.get(name).states.keys()
            assert torch.equal(row_states(copied, row), row_states(view, 0))
            assert copied.row_token_ids(row).tolist() == list(documents[name].encode())


def test_every_read_sees_the_last_commit_and_lets_go_of_shards_that_are_no_more(tmp_path, model):
    store, reader = whole_store(tmp_path, model), ContextStore(tmp_path, read_only=True)
    store.add(["a", "b"], ["one", "two"])
    before = reader.get(["a", "b"])
    store.add("b", "changed")
    after = reader.get(["a", "b"])
    assert torch.equal(row_states(before, 1), model.states("two"))
    assert torch.equal(row_states(after, 1), model.states("changed"))
    store.add("a", "one of another shard")
    store.add("b", "too")
    assert torch.equal(row_states(reader.get("b"), 0), model.states("too"))
    # deleted files that stay open would hold their room on the disk
    live = {row[0] for row in store.catalogue.rows("SELECT shard FROM shards")}
    assert set(reader._reader._shards) <= live
    store.evict("a")
    with pytest.raises(MissingDocumentError):
        reader.get("a")


def test_shards_are_safetensors_files(store, model):
    store.add(["a", "b"], ["one", "three"])
    (path,) = (store.folder / "shards").iterdir()
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "xcllama-context-shard", "fingerprint": model.fingerprint}
        assert torch.equal(file.get_tensor("hidden"), model.states("onethree"))
        assert file.get_tensor("token_ids").tolist() == list(b"onethree")
    assert store._reader.shard(1).parts["hidden"].offset % 64 == 4 * len("onethree") % 64
