"""Publishing with something in the way: a clear line, the old revision whole, nothing sent in vain."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from publishing_support import make_checkpoint, model_target, push, quiet, server, tree
from transformers.utils.hub import hf_api

from xcllama.publishing import assembling
from xcllama.publishing.publishing import Release, publish
from xcllama.publishing.uploading import check_rights, compare, upload

TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Something to publish: a file that every such repository has, a card and two large files."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A\n")
    for name in ("one", "two"):
        (tmp_path / "folder" / f"{name}.safetensors").write_bytes(name.encode() * 50_000)
    return tmp_path / "folder"


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


def test_a_revision_is_a_branch_of_its_own(server, folder):
    push(folder, model_target("branches"))
    before = tree("tester/branches")
    (folder / "config.json").write_text('{"a": 1}')
    push(folder, model_target("branches", tag="v2", branch="next"))
    assert tree("tester/branches") == before
    assert (
        tree("tester/branches", revision="next")["config.json"]
        == tree("tester/branches", revision="v2")["config.json"]
        == 8
    )
    # its own parent, whatever main is by now
    (folder / "config.json").write_text('{"a": 12}')
    changes = compare(HfApi(), folder, model_target("branches", tag="v3", branch="next"))
    assert (changes.changed, changes.added, changes.removed) == (["config.json"], [], [])
    assert Release("model", "tester", "v1", branch="next").target("model", "tester/x").branch == "next"


def test_a_pull_request_leaves_branch_and_tags(server, folder):
    push(folder, model_target("asked"))
    before = tree("tester/asked")
    (folder / "config.json").write_text('{"a": 1}')
    assert push(folder, model_target("asked", tag="v2", create_pr=True)).endswith("/discussions/1")
    assert tree("tester/asked") == before
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="there is nothing to open a pull request for"):
        push(folder, model_target("asked", tag="v2", create_pr=True))
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


def make_space(folder: Path) -> Path:
    """The files of a Space that is none."""
    space = folder / "space"
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
    return space


def test_a_dry_run_without_a_token_asks_nobody(server, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    asked, space = [], make_space(tmp_path)
    server.store.faults.append(lambda handler: asked.append(handler.path))
    checkpoint = make_checkpoint(tmp_path / "cache", tmp_path / "tiny")
    release = Release("space", "someone", "v1", space=space, checkpoint=checkpoint)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(assembling, "check_space", lambda *values: None)
        publish(release, tmp_path / "out", dry_run=True)
    out = capsys.readouterr().out
    assert "5 added" in out
    assert "dry run: nothing was sent\nan upload would be refused, and every file counts as new: no Hub token" in out
    assert asked == []
    assert "- someone/tiny\n" in (tmp_path / "out" / "space" / "xcllama-demo" / "README.md").read_text()
    with pytest.raises(ValueError, match="no Hub token"):
        publish(release, None, dry_run=False)


def test_a_space_that_cannot_run_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    space, checkpoint = make_space(tmp_path), make_checkpoint(tmp_path / "cache", tmp_path / "tiny")
    release = Release("space", "tester", "v1", space=space, checkpoint=checkpoint)
    (space / "app.py").write_text("raise SystemExit('no model here')\n")
    with pytest.raises(ValueError, match="the Space does not start: no model here"):
        publish(release, None, dry_run=False)
    (space / "app.py").write_text("print(\n")
    with pytest.raises(ValueError, match="does not compile"):
        publish(release, None, dry_run=True)
    (space / "app.py").unlink()
    with pytest.raises(ValueError, match=r"holds no Space: it has no app\.py"):
        publish(release, None, dry_run=True)


def test_publishing_without_the_repository_says_so(tmp_path, monkeypatch):
    """As from a wheel: what is published is in no installed package."""
    monkeypatch.setattr("xcllama.publishing.publishing.ROOT", tmp_path)
    with pytest.raises(ValueError, match="publishing needs a clone of the repository"):
        publish(Release("model", "tester", "v1"), None, dry_run=True)


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
    checkpoint = make_checkpoint(tmp_path / "cache", tmp_path / "tiny")
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
    assert hf_api().endpoint == server.url
    server.store.faults.append(lambda handler: handler.command != "GET" and sent.append(handler.path))
    with pytest.raises(ValueError, match=message) as error:
        publish(Release("model", "tester", "v1", checkpoint=checkpoint), None, dry_run=False)
    assert "\n" not in str(error.value)
    assert [path for path in sent if path.startswith("/api/")] == []
