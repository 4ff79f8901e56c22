"""Where figures come from: the tree, the command, the code, and what a caption says of them."""

import json
import subprocess
import sys

import pytest

from xcllama import provenance
from xcllama.provenance import age, caption, is_current, require_clean, write_result

CODE = '"""What it is."""\n\n\ndef double(x):\n    """Twice x."""\n    return 2 * x  # fast\n'


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one module, committed, in place of this one."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(CODE)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    fresh()
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    yield tmp_path
    fresh()


def fresh() -> None:
    """As in a new process."""
    provenance.tree.cache_clear()
    provenance.code_digest.cache_clear()


def git(folder, *arguments: str) -> None:
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *names, *arguments], check=True, capture_output=True)


def commit(folder) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "more")
    fresh()


def measured(folder) -> dict:
    write_result(folder / "results" / "it.json", {"value": 1}, ["package"], seed=3)
    return json.loads((folder / "results" / "it.json").read_text())["provenance"]


def test_results_are_written_from_clean_trees_only(repository):
    run = measured(repository)
    assert (run["dirty"], run["seed"], len(run["commit"])) == (False, 3, 40)
    assert run["cpu_capability"] in caption(run)
    # what a run writes, and what is rendered from it, leaves the tree clean
    (repository / "README.md").write_text("rendered")
    fresh()
    require_clean(repository / "results" / "it.json")
    (repository / "package" / "new.py").write_text("")
    fresh()
    for place in (repository / "results" / "it.json", repository / "results"):
        with pytest.raises(ValueError, match="this tree has uncommitted changes; commit them, or write to runs"):
            require_clean(place)
    with pytest.raises(ValueError, match="write to runs/part/it.json instead"):
        write_result(repository / "results" / "part" / "it.json", {}, [])
    require_clean(None)
    write_result(repository / "runs" / "it.json", {}, ["package"])
    run = json.loads((repository / "runs" / "it.json").read_text())["provenance"]
    assert f"commit {run['commit']}, with uncommitted changes, " in caption(run)


def test_a_caption_tells_whether_the_code_changed(repository):
    run = measured(repository)
    module = repository / "package" / "module.py"
    # comments, docstrings and layout are no code
    module.write_text(CODE.replace("# fast", "").replace("Twice", "Two times").replace("2 * x", "(2 * x)"))
    commit(repository)
    assert is_current(run)
    assert caption(run).endswith(": code of this figure unchanged")
    assert age(run) == "1 commits ago"
    module.write_text(CODE.replace("2 * x", "x + x"))
    commit(repository)
    assert caption(run).endswith(": measured before its code changed")
    assert age(run) == "2 commits ago"
    module.write_text(CODE)
    fresh()
    assert is_current(run)
    module.rename(repository / "elsewhere.py")
    (repository / "package").rmdir()
    fresh()
    assert not is_current(run)
    assert not is_current({"commit": run["commit"]})
    assert age(run | {"commit": "0" * 40}) == "at a commit that is not in this history"


def test_without_a_checkout_there_is_the_version(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    fresh()
    write_result(tmp_path / "results" / "it.json", {}, [])
    run = json.loads((tmp_path / "results" / "it.json").read_text())["provenance"]
    assert (run["commit"], run["dirty"]) == (None, None)
    assert f", xcllama {run['versions']['xcllama']}, " in caption(run)
    fresh()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["/x/bin/python", "scripts/a.py", "--json", "ROOT/runs/b c.json"],
            "python scripts/a.py --json 'runs/b c.json'",
        ),
        (["/x/bin/python", "-m", "xcllama", "train"], "python -m xcllama train"),
        (["/x/bin/python3.11", "/x/bin/xcllama", "train", "smoke"], "xcllama train smoke"),
    ],
    ids=["script", "module", "console"],
)
def test_the_command_is_the_one_that_ran(monkeypatch, words, expected):
    monkeypatch.setattr(sys, "orig_argv", [word.replace("ROOT", str(provenance.ROOT)) for word in words])
    assert provenance.command() == expected


def test_items_of_lists_take_a_line_each(tmp_path):
    write_result(tmp_path / "it.json", {"rows": [{"a": 1, "b": [1, 2]}, {"a": 2}], "flat": [1, 2], "none": {}}, [])
    text = (tmp_path / "it.json").read_text()
    assert text.endswith('"rows": [\n  {"a": 1, "b": [1, 2]},\n  {"a": 2}\n ],\n "flat": [1, 2],\n "none": {}\n}\n')
    assert [path.name for path in tmp_path.iterdir()] == ["it.json"]
