"""Published corpora of contexts: private, moved, cut off or on a full disk; nothing half-written is ever loaded."""

import json
import resource
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, HfFileSystem, constants
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from publishing_support import model_target, push, quiet, server, strange_numbers, tree
from store_support import ByteProcessor, TableModel, row_states, whole_store

from modeling_xcllama import XCLlamaForCausalLM
from xcllama.publishing.rendering import check_card
from xcllama.store import ContextStore, DamagedDocumentError, pull
from xcllama.store.manifest import Manifest, render_card

TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.usefixtures("quiet")
TEXTS = {f"document {number}": f"lighthouse number {number} " * (20 + number) for number in range(30)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A snapshot of several shards."""
    folder = tmp_path_factory.mktemp("corpus")
    with whole_store(folder / "s", shard_bytes=80_000) as store:
        store.add(TEXTS.keys(), TEXTS.values())
        manifest = store.snapshot(folder / "snapshot")
    assert len(manifest.shards) > 2
    return folder / "snapshot"


@pytest.fixture
def opened(tmp_path):
    """Open a published corpus: `opened(repo_id, **options)`."""
    stores = []

    def open_store(path, model=None, **options) -> ContextStore:
        folder = tmp_path / f"cache{len(stores)}"
        stores.append(ContextStore.open(path, model or TableModel(), ByteProcessor(), cache_folder=folder, **options))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def test_the_card_says_what_the_manifest_says(corpus):
    manifest = Manifest.from_json((corpus / "manifest.json").read_text(), str(corpus))
    card = render_card(manifest, "hf://datasets/org/lighthouses", "Lighthouses", "cc-by-4.0").decode()
    assert check_card(card, "card")["license"] == "cc-by-4.0"
    data = [json.loads((corpus / "manifest.json").read_text()), manifest.nbytes, manifest.nbytes / manifest.tokens]
    template = TESTS.parent / "model_cards" / "context_card.md.jinja"
    assert strange_numbers(card, [*data, len(manifest.shards), 4.0], template) == set()


def push_corpus(corpus: Path, name: str, **fields) -> str:
    push(corpus, model_target(name, repo_type="dataset", marker="manifest.json", **fields))
    return f"tester/{name}"


def cut_download(part: str):
    """A fault: downloads of files with `part` in their path end in the middle."""

    def fault(handler) -> bool:
        if handler.command != "GET" or "/resolve/" not in handler.path or part not in handler.path:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", "60000")
        handler.end_headers()
        handler.wfile.write(b"x" * 1000)
        handler.close_connection = True
        handler.connection.close()
        return True

    return fault


def assert_whole(store: ContextStore) -> None:
    """The corpus is what was published."""
    assert store.ids() == list(TEXTS)
    cache = store.get(store.ids())
    for row, text in enumerate(TEXTS.values()):
        assert torch.equal(row_states(cache, row), TableModel().states(text))


def test_a_download_cut_off_is_never_served(server, corpus, opened):
    repo_id = push_corpus(corpus, "dropped")
    store = opened(repo_id)
    server.store.faults.append(cut_download("shards/"))
    with pytest.raises((HTTPError, DamagedDocumentError)):
        store.get(store.ids())
    server.store.faults[:] = [cut_download("catalogue/")]
    with pytest.raises((HTTPError, ValueError)):
        opened(repo_id)
    server.store.faults.clear()
    assert_whole(store)
    assert_whole(opened(repo_id))


def test_a_model_cut_off_is_never_loaded(server, tiny_model, tmp_path, monkeypatch):
    tiny_model.save_pretrained(tmp_path / "model")
    push(tmp_path / "model", model_target("model"))
    server.store.faults.append(cut_download("model.safetensors"))
    with pytest.raises((HTTPError, OSError)):
        XCLlamaForCausalLM.from_pretrained("tester/model", revision="v1")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(OSError, match="model.safetensors"):
            XCLlamaForCausalLM.from_pretrained("tester/model", revision="v1")
    server.store.faults.clear()
    loaded = XCLlamaForCausalLM.from_pretrained("tester/model", revision="v1")
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in tiny_model.state_dict().items())


def test_a_full_disk_while_downloading(server, corpus, tmp_path):
    repo_id = push_corpus(corpus, "full")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel refuses to write more, in the middle of a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            pull(repo_id, tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = {path.name: path.stat().st_size for path in (tmp_path / "copy").rglob("*.*") if path.is_file()}
    sizes = {path.name: path.stat().st_size for path in (corpus / "shards").iterdir()}
    # those that fit are whole, of the others there is nothing
    assert found.items() < sizes.items()
    pull(repo_id, tmp_path / "copy")
    with ContextStore.open(tmp_path / "copy", TableModel(), ByteProcessor(), cache_folder=tmp_path / "cache") as store:
        assert_whole(store)


def test_a_private_corpus_needs_the_token(server, corpus, opened, monkeypatch):
    repo_id = push_corpus(corpus, "secret", private=True)
    with monkeypatch.context() as stranger:
        stranger.delenv("HF_TOKEN")
        HfFileSystem.clear_instance_cache()
        with pytest.raises((RepositoryNotFoundError, FileNotFoundError)):
            opened(repo_id)
    HfFileSystem.clear_instance_cache()
    assert_whole(opened(repo_id))


def test_a_fixed_revision_does_not_move(server, corpus, opened):
    repo_id = push_corpus(corpus, "fixed")
    store = opened(repo_id)
    api, where = HfApi(), {"repo_id": repo_id, "repo_type": "dataset"}
    manifest = json.loads((corpus / "manifest.json").read_text()) | {"namespace": "moved"}
    api.upload_file(path_or_fileobj=json.dumps(manifest).encode(), path_in_repo="manifest.json", **where)
    for entry in manifest["shards"]:
        api.upload_file(path_or_fileobj=b"another", path_in_repo=entry["name"], **where)
    assert_whole(opened(repo_id, revision="v1"))
    # opened before: all files are of one commit, whatever moves
    assert_whole(store)
    moved = opened(repo_id)
    assert moved.namespace == "moved"
    with pytest.raises(DamagedDocumentError):
        moved.get(moved.ids())
    with pytest.raises(ValueError, match="`revision` is for a repository on the Hub"):
        opened(corpus, revision="v1")


def test_the_states_of_another_model_are_not_fetched(server, corpus, opened):
    repo_id, asked = push_corpus(corpus, "others"), []
    server.store.faults.append(lambda handler: asked.append(handler.path))
    with pytest.raises(ValueError, match="made by another model|another model.*fingerprint is table-0.* table-1"):
        opened(repo_id, TableModel(1))
    assert not [path for path in asked if "shards/" in path]
    assert len(opened(repo_id)) == len(TEXTS)


def test_a_store_pushes_to_the_hub_is_served_from_it_and_pulled(server, tmp_path):
    model, processor = TableModel(), ByteProcessor()
    api, url = HfApi(), "hf://datasets/tester/pushed"
    api.create_repo("tester/pushed", repo_type="dataset")
    with whole_store(tmp_path / "s", model, shard_bytes=80_000) as store:
        store.add(TEXTS.keys(), TEXTS.values())
        store.snapshot(url)
    with ContextStore.open(url, model, processor, cache_folder=tmp_path / "ranges") as store:
        cache = store.get(["document 7"])
        assert torch.equal(row_states(cache, 0), model.states(TEXTS["document 7"]))
        nbytes = sum(size for name, size in tree("tester/pushed", repo_type="dataset").items() if "shards/" in name)
        # by range, not whole shards
        assert 0 < store.metrics.total.bytes_fetched < nbytes / 3
    pull(url, tmp_path / "copy")
    with ContextStore.open(tmp_path / "copy", model, processor, cache_folder=tmp_path / "ranges") as store:
        assert store.verify().checked == len(TEXTS)
