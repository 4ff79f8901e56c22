"""Published corpora of contexts: private, moved, cut off or on a full disk; nothing half-written is ever loaded."""

import json
import resource
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from publishing_support import model_target, push, quiet, server, strange_numbers, tree
from store_support import ByteProcessor, TableModel, row_states

from context_store import ContextStore
from context_store.manifest import Folder, Manifest
from context_store.snapshot import pull, write_card
from modeling_xcllama import XCLlamaForCausalLM
from modeling_xcllama.context_repository import load_contexts
from xcllama.publishing.assembling import write_index
from xcllama.publishing.rendering import check_card

TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.usefixtures("quiet")
TEXTS = {f"document {number}": f"lighthouse number {number} " * (20 + number) for number in range(30)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A snapshot of several shards, with the index that `load_contexts` reads."""
    folder = tmp_path_factory.mktemp("corpus")
    with ContextStore(folder / "s", TableModel(), ByteProcessor(), shard_bytes=80_000) as store:
        store.add(TEXTS.keys(), TEXTS.values())
        manifest = store.snapshot(folder / "snapshot")
    write_index(folder / "snapshot", manifest)
    assert len(manifest.shards) > 2
    return folder / "snapshot"


def test_the_card_says_what_the_manifest_says(corpus):
    manifest = Manifest.from_json((corpus / "manifest.json").read_text(), str(corpus))
    write_card(Folder(corpus), manifest, "Lighthouses", "cc-by-4.0", "org/lighthouses")
    card = (corpus / "README.md").read_text()
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


def assert_whole(repo_id: str, corpus: Path) -> None:
    """The corpus loads, and is what was published."""
    cache, ids = load_contexts(repo_id), json.loads((corpus / "contexts.json").read_text())["files"]
    model = TableModel()
    names = [name for file in ids for name in file["ids"]]
    assert sorted(names) == sorted(TEXTS)
    for row, name in enumerate(names):
        assert torch.equal(row_states(cache, row), model.states(TEXTS[name]))


def test_a_download_cut_off_is_never_loaded(server, corpus, monkeypatch):
    repo_id = push_corpus(corpus, "dropped")
    server.store.faults.append(cut_download("shards/"))
    with pytest.raises(HTTPError, match="closed connection"):
        load_contexts(repo_id)
    # the cache has the index and no shard: offline there is nothing to load
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises((ValueError, LocalEntryNotFoundError)):
            load_contexts(repo_id)
    server.store.faults.clear()
    assert_whole(repo_id, corpus)


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
            load_contexts(repo_id)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = {path.name: path.stat().st_size for path in (tmp_path / "hub_cache").rglob("snapshots/*/shards/*")}
    sizes = {path.name: path.stat().st_size for path in (corpus / "shards").iterdir()}
    # those that fit are whole, of the others there is nothing
    assert found.items() < sizes.items()
    assert_whole(repo_id, corpus)


def test_a_private_corpus_needs_the_token(server, corpus, monkeypatch):
    repo_id = push_corpus(corpus, "secret", private=True)
    with monkeypatch.context() as stranger:
        stranger.delenv("HF_TOKEN")
        with pytest.raises(RepositoryNotFoundError):
            load_contexts(repo_id)
    assert_whole(repo_id, corpus)


def test_a_fixed_revision_does_not_move(server, corpus, tmp_path):
    repo_id = push_corpus(corpus, "fixed")
    api = HfApi()
    index = json.loads((corpus / "contexts.json").read_text())
    less = {**index, "files": index["files"][:1]}
    where = {"repo_id": repo_id, "repo_type": "dataset"}
    api.upload_file(path_or_fileobj=json.dumps(less).encode(), path_in_repo="contexts.json", **where)
    assert len(load_contexts(repo_id, revision="v1")) == len(TEXTS)
    assert len(load_contexts(repo_id)) == len(index["files"][0]["ids"])
    with pytest.raises(ValueError, match="`revision` is for a repository on the Hub"):
        load_contexts(corpus, revision="v1")


def test_the_states_of_another_model_are_not_fetched(server, corpus):
    repo_id, asked = push_corpus(corpus, "others"), []
    server.store.faults.append(lambda handler: asked.append(handler.path))
    with pytest.raises(ValueError, match="made by another model.*: their fingerprint is table-0, the model's table-1"):
        load_contexts(repo_id, fingerprint="table-1")
    assert not [path for path in asked if "shards/" in path]
    assert len(load_contexts(repo_id, fingerprint="table-0")) == len(TEXTS)


@pytest.mark.parametrize("change", ["name", "sha256", "tokens", "missing", "format"])
def test_an_index_is_not_trusted(server, corpus, tmp_path, change):
    for path in corpus.rglob("*"):
        if path.is_file():
            (tmp_path / "c" / path.relative_to(corpus)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "c" / path.relative_to(corpus)).write_bytes(path.read_bytes())
    index = json.loads((corpus / "contexts.json").read_text())
    first = index["files"][0]
    if change == "name":
        first["name"] = "../../etc/x.safetensors"
    elif change == "sha256":
        first["sha256"] = "0" * 64
    elif change == "tokens":
        first["tokens"][0] += 1
    elif change == "missing":
        (tmp_path / "c" / first["name"]).unlink()
    else:
        index["format"] = "other"
    (tmp_path / "c" / "contexts.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"cannot be read: .*; fetch them again\.|has format 'other' 1, expected"):
        load_contexts(tmp_path / "c")
    (tmp_path / "c" / "contexts.json").unlink()
    with pytest.raises(ValueError, match=r"no published corpus of contexts: it has no contexts\.json"):
        load_contexts(tmp_path / "c")


def test_a_store_pushes_to_the_hub_is_served_from_it_and_pulled(server, tmp_path):
    model, processor = TableModel(), ByteProcessor()
    api, url = HfApi(), "hf://datasets/tester/pushed"
    api.create_repo("tester/pushed", repo_type="dataset")
    with ContextStore(tmp_path / "s", model, processor, shard_bytes=80_000) as store:
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
