"""Publishing and fetching with something in the way: a clear line, the old revision whole, nothing half-written."""

import json
import resource
import runpy
import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, HfFileSystem, constants
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from context_store import ContextStore
from context_store.snapshot import pull
from model_cards.assembling import write_index
from model_cards.publishing import Release, publish
from model_cards.uploading import Target, check_rights, compare, upload
from modeling_xcllama.context_repository import load_contexts

TESTS = Path(__file__).resolve().parent
SUPPORT = runpy.run_path(str(TESTS / "publishing_support.py"))
STORE = runpy.run_path(str(TESTS / "store_support.py"))
TEXTS = {f"document {number}": f"lighthouse number {number} " * (20 + number) for number in range(30)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    HfFileSystem.clear_instance_cache()
    with SUPPORT["hub_on_loopback"](tmp_path_factory.mktemp("hub")) as server:
        yield server
    HfFileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def quiet(server, tmp_path, monkeypatch):
    """Each test begins with a healthy server and an empty cache; the clients do not wait between attempts."""
    server.store.faults.clear()
    server.store.role, server.store.organizations = "write", []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Something to publish: a file that every such repository has, a card and two large files."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A\n")
    for name in ("one", "two"):
        (tmp_path / "folder" / f"{name}.safetensors").write_bytes(name.encode() * 50_000)
    return tmp_path / "folder"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A snapshot of several shards, with the index that `load_contexts` reads."""
    folder = tmp_path_factory.mktemp("corpus")
    with ContextStore(folder / "s", STORE["TableModel"](), STORE["ByteProcessor"](), shard_bytes=80_000) as store:
        store.add(TEXTS.keys(), TEXTS.values())
        manifest = store.snapshot(folder / "snapshot")
    write_index(folder / "snapshot", manifest)
    assert len(manifest.shards) > 2
    return folder / "snapshot"


def model_target(name: str, **fields) -> Target:
    return Target(
        **({"repo_id": f"tester/{name}", "repo_type": "model", "marker": "config.json", "tag": "v1"} | fields)
    )


def push(folder: Path, target: Target) -> str:
    api = HfApi()
    return upload(api, folder, target, compare(api, folder, target), "test")


def push_corpus(corpus: Path, name: str, **fields) -> str:
    push(corpus, model_target(name, repo_type="dataset", marker="manifest.json", **fields))
    return f"tester/{name}"


def tree(repo_id: str, **where) -> dict[str, int]:
    entries = HfApi().list_repo_tree(repo_id, recursive=True, **where)
    return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}


def test_who_may_not_write_is_told_before_anything_is_sent(server, monkeypatch):
    api, target = HfApi(), model_target("rights")
    check_rights(api, target)
    with pytest.raises(
        ValueError, match=r"tester has no right to write to 'someone'; namespaces of this token: tester"
    ):
        check_rights(api, model_target("x", repo_id="someone/x"))
    server.store.organizations = [{"name": "org", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
    check_rights(api, model_target("x", repo_id="org/x"))
    with pytest.raises(ValueError, match="no right to write to 'readers'.*: tester, org"):
        check_rights(api, model_target("x", repo_id="readers/x"))
    server.store.role = "read"
    with pytest.raises(ValueError, match="the token of tester may only read"):
        check_rights(api, target)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ValueError, match="the Hub refuses this token") as error:
        check_rights(api, target)
    assert "hf_another" not in str(error.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"no Hub token: run `hf auth login` or set HF_TOKEN"):
        check_rights(api, target)
    assert server.store.repos == {}


def test_names_that_are_taken(server, folder):
    push(folder, model_target("taken"))
    with pytest.raises(ValueError, match="tester/taken is the name of a model already"):
        push(folder, model_target("taken", repo_type="dataset"))
    with pytest.raises(ValueError, match=r"tester/taken holds something else: it has no manifest\.json"):
        push(folder, model_target("taken", marker="manifest.json"))
    with pytest.raises(ValueError, match="tester/taken is public"):
        push(folder, model_target("taken", private=True))
    (folder / "config.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="has a tag 'v1' already; give the new version one with --tag"):
        push(folder, model_target("taken"))


def test_a_new_version_is_one_commit_of_what_changed(server, folder):
    first, where = model_target("versions"), {"repo_id": "tester/versions"}
    assert push(folder, first).endswith("/tester/versions/tree/v1")
    # once more: nothing to do
    push(folder, first)
    assert len(HfApi().list_repo_commits(**where)) == 2
    (folder / "one.safetensors").unlink()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "new.txt").write_text("new")
    changes = compare(HfApi(), folder, model_target("versions", tag="v2"))
    assert (changes.added, changes.changed, changes.removed) == (["new.txt"], ["config.json"], ["one.safetensors"])
    assert list(changes.lines()) == [
        "  + new.txt", "  ~ config.json", "  - one.safetensors", "  1 added, 1 changed, 1 removed, 2 unchanged",
    ]  # fmt: skip
    push(folder, model_target("versions", tag="v2"))
    assert len(HfApi().list_repo_commits(**where)) == 3
    assert "one.safetensors" in tree("tester/versions", revision="v1")
    assert "one.safetensors" not in tree("tester/versions", revision="v2")
    assert "one.safetensors" not in tree("tester/versions")


def test_a_pull_request_leaves_branch_and_tags(server, folder):
    push(folder, model_target("asked"))
    before = tree("tester/asked")
    (folder / "config.json").write_text('{"a": 1}')
    assert push(folder, model_target("asked", tag="v2", create_pr=True)).endswith("/discussions/1")
    assert tree("tester/asked") == before
    assert [tag.name for tag in HfApi().list_repo_refs("tester/asked").tags] == ["v1"]


def test_a_branch_that_moved_meanwhile_is_not_overwritten(server, folder):
    api, target = HfApi(), model_target("moving", tag="v2")
    push(folder, model_target("moving"))
    (folder / "config.json").write_text('{"a": 1}')
    changes = compare(api, folder, target)
    api.upload_file(path_or_fileobj=b"theirs", path_in_repo="config.json", repo_id="tester/moving")
    with pytest.raises(ValueError, match="tester/moving was not changed: the branch has moved meanwhile"):
        upload(api, folder, target, changes, "test")
    assert tree("tester/moving")["config.json"] == len(b"theirs")


def refuse(method: str, part: str, status: int):
    """A fault: requests of that kind are answered with an error status."""

    def fault(handler) -> bool:
        if handler.command != method or part not in handler.path:
            return False
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        handler.send({"error": "no"}, status)
        return True

    return fault


def drop_uploads(seen: list[str]):
    """A fault: large files, recorded in `seen`, are cut off in the middle, all but the first one's."""

    def fault(handler) -> bool:
        if handler.command != "PUT" or "/_lfs/" not in handler.path:
            return False
        seen.append(handler.path.rpartition("/")[2])
        if seen[-1] == seen[0]:
            return False
        handler.rfile.read(int(handler.headers["Content-Length"]) // 2)
        handler.close_connection = True
        handler.connection.close()
        return True

    return fault


def test_a_refused_commit_changes_nothing(server, folder):
    push(folder, model_target("refused"))
    (folder / "config.json").write_text('{"a": 1}')
    server.store.faults.append(refuse("POST", "/commit/", 403))
    with pytest.raises(ValueError, match="tester/refused was not changed: this token has no right to write there"):
        push(folder, model_target("refused", tag="v2"))
    server.store.faults.clear()
    assert tree("tester/refused")["config.json"] == 2


def test_an_upload_cut_off_leaves_the_old_revision_and_goes_on(server, folder):
    push(folder, model_target("cut"))
    before = tree("tester/cut")
    for name in ("one", "two"):
        (folder / f"{name}.safetensors").write_bytes(name.encode() * 60_000)
    seen, target = [], model_target("cut", tag="v2")
    server.store.faults.append(drop_uploads(seen))
    with pytest.raises(ValueError, match="tester/cut was not changed: "):
        push(folder, target)
    assert tree("tester/cut") == before
    assert [tag.name for tag in HfApi().list_repo_refs("tester/cut").tags] == ["v1"]
    arrived = {digest for digest in seen if server.store.blob(digest).exists()}
    assert arrived == {seen[0]} != set(seen)
    server.store.faults.clear()
    again: list[str] = []
    server.store.faults.append(lambda handler: handler.command == "PUT" and again.append(handler.path[-64:]))
    push(folder, target)
    assert tree("tester/cut", revision="v2")["two.safetensors"] == 180_000
    # what arrived whole was not sent again
    assert set(again) == set(seen) - arrived


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
    model = STORE["TableModel"]()
    names = [name for file in ids for name in file["ids"]]
    assert sorted(names) == sorted(TEXTS)
    for row, name in enumerate(names):
        assert torch.equal(STORE["row_states"](cache, row), model.states(TEXTS[name]))


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
    with pytest.raises(ValueError, match=r"the contexts in .* cannot be read: .*; fetch them again\."):
        load_contexts(tmp_path / "c")
    (tmp_path / "c" / "contexts.json").unlink()
    with pytest.raises(ValueError, match=r"no published corpus of contexts: it has no contexts\.json"):
        load_contexts(tmp_path / "c")


def test_a_store_pushes_to_the_hub_is_served_from_it_and_pulled(server, tmp_path):
    model, processor = STORE["TableModel"](), STORE["ByteProcessor"]()
    api, url = HfApi(), "hf://datasets/tester/pushed"
    api.create_repo("tester/pushed", repo_type="dataset")
    with ContextStore(tmp_path / "s", model, processor, shard_bytes=80_000) as store:
        store.add(TEXTS.keys(), TEXTS.values())
        store.snapshot(url)
    with ContextStore.open(url, model, processor, cache_folder=tmp_path / "ranges") as store:
        cache = store.get(["document 7"])
        assert torch.equal(STORE["row_states"](cache, 0), model.states(TEXTS["document 7"]))
        nbytes = sum(size for name, size in tree("tester/pushed", repo_type="dataset").items() if "shards/" in name)
        # by range, not whole shards
        assert 0 < store.metrics.total.bytes_fetched < nbytes / 3
    pull(url, tmp_path / "copy")
    with ContextStore.open(tmp_path / "copy", model, processor, cache_folder=tmp_path / "ranges") as store:
        assert store.verify().checked == len(TEXTS)


def test_a_dry_run_without_a_token_asks_nobody(server, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    asked = []
    server.store.faults.append(lambda handler: asked.append(handler.path))
    space = tmp_path / "space"
    space.mkdir()
    (space / "app.py").write_text("print('hello')\n")
    (space / "requirements.txt").write_text("gradio\n")
    fields = {
        "title": "T",
        "emoji": "x",
        "colorFrom": "red",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": "6.31.0",
    }
    fields |= {"app_file": "app.py", "license": "apache-2.0"}
    header = "".join(f"{name}: {value}\n" for name, value in fields.items())
    (space / "README.md").write_text(f"---\n{header}models:\n- xcllama/a\n---\n# T\ntext\n")
    release = Release("space", "someone", "v1", space=space)
    publish(release, tmp_path / "out", dry_run=True)
    out = capsys.readouterr().out
    assert "3 added" in out
    assert "dry run: nothing was sent" in out
    assert asked == []
    assert "- someone/a\n" in (tmp_path / "out" / "space" / "xcllama-demo" / "README.md").read_text()
    with pytest.raises(ValueError, match="no Hub token"):
        publish(release, None, dry_run=False)
    (space / "app.py").write_text("print(\n")
    with pytest.raises(ValueError, match="does not compile"):
        publish(release, None, dry_run=True)
    (space / "app.py").unlink()
    with pytest.raises(ValueError, match=r"holds no Space: it has no app\.py"):
        publish(release, None, dry_run=True)


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("weights", r"has no weights: neither cross_attention\.safetensors nor model\.safetensors"),
        ("base", "belongs to HuggingFaceTB/SmolLM2-135M-Instruct, which cannot be found"),
        ("records", r"has no training\.json, which fills its card"),
        ("slot", r"model_card\.md\.jinja has an empty slot"),
    ],
)
def test_nothing_is_sent_when_a_model_cannot_be_made(server, tmp_path, monkeypatch, capsys, breakage, message):
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    checkpoint = SUPPORT["make_checkpoint"](tmp_path / "cache", tmp_path / "tiny")
    if breakage == "weights":
        (checkpoint / "cross_attention.safetensors").unlink()
    elif breakage == "base":
        shutil.rmtree(tmp_path / "cache" / "models")
    elif breakage == "records":
        (checkpoint / "training.json").unlink()
    else:
        trained = json.loads((checkpoint / "training.json").read_text())
        (checkpoint / "training.json").write_text(json.dumps(trained | {"base_source": None}))
    sent = []
    server.store.faults.append(lambda handler: handler.command != "GET" and sent.append(handler.path))
    with pytest.raises(ValueError, match=message) as error:
        publish(Release("model", "tester", "v1", checkpoint=checkpoint), None, dry_run=False)
    assert "\n" not in str(error.value)
    assert [path for path in sent if path.startswith("/api/")] == []
