"""Published builds, read back by the real clients from a Hub on loopback, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from publishing_support import hub_on_loopback

from xcllama.publishing.publishing import Release, publish

REPOSITORY = Path(__file__).resolve().parents[1]
FIXTURES = REPOSITORY / "tests" / "fixtures"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Environment of a process that talks to a fresh Hub on loopback, as this process does."""
    root = tmp_path_factory.mktemp("hub")
    with hub_on_loopback(root) as server:
        yield os.environ | {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(root / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
        }


def run(hub, folder, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments], env=hub, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


BUILD = str(REPOSITORY / "scripts" / "build_dataset.py")
MIX = [
    "--source", "mix", "--mix-of", "squad_v2", "hotpotqa", "--path", f"squad_v2={FIXTURES / 'squad_v2.json'}",
    "--path", f"hotpotqa={FIXTURES / 'hotpotqa_distractor.json'}", "--benchmarks", "repliqa",
    "--path", f"repliqa={FIXTURES / 'repliqa.jsonl'}",
]  # fmt: skip

READ_BACK = """
import json, sys
from datasets import load_dataset
repo = sys.argv[1]
found = {}
for config in (None, "squad_v2", "repliqa"):
    splits = load_dataset(repo, config, streaming=True)
    found[config or "default"] = {split: list(rows) for split, rows in splits.items()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    run(hub, folder, BUILD, *MIX, "--output", "mix")
    release = Release("dataset", "tester", "v1", repo_id="tester/mix", build=f"file://{folder}/mix")
    publish(release, None, dry_run=False)
    return folder


def test_a_published_mix_reads_back_row_for_row(hub, published):
    from_hub = json.loads(run(hub, published, "-c", READ_BACK, "tester/mix"))
    from_folder = json.loads(run(hub, published, "-c", READ_BACK, str(published / "mix")))
    assert from_hub == from_folder
    table = json.loads((published / "mix" / "build.json").read_text())
    for name, read in from_hub.items():
        config = table["configs"]["mix" if name == "default" else name]
        assert {split: len(rows) for split, rows in read.items()} == {
            split: counts["rows"] for split, counts in config["splits"].items()
        }
    rows = [row for rows in from_hub["squad_v2"].values() for row in rows]
    assert sorted(row["sample_idx"] for row in rows) == ["novara-1", "orta-1", "orta-2"]
    assert from_hub["repliqa"]["test"][1]["answer"] == "UNANSWERABLE"


CARD = """
import sys
from huggingface_hub import DatasetCard, HfApi
card = DatasetCard.load(sys.argv[1])
card.validate()
data = card.data.to_dict()
configs = {config["config_name"]: config.get("default", False) for config in data["configs"]}
assert configs == {"squad_v2": False, "hotpotqa": False, "repliqa": False, "mix": True, "tasks": False}, configs
assert {info["config_name"] for info in data["dataset_info"]} == set(configs)
assert data["license"] == "other" and data["task_categories"] == ["question-answering"]
assert "build.json" in HfApi().list_repo_files(sys.argv[1], repo_type="dataset")
print(card.text)
"""


def test_the_published_card_has_terms_sizes_and_no_empty_section(hub, published):
    text = run(hub, published, "-c", CARD, "tester/mix")
    assert 'load_dataset("tester/mix", "mix"' in text
    for part in ("CC BY-SA 4.0", "## Known limits", "## Citation", "How it was built", "| `squad_v2` |"):
        assert part in text
    assert "More Information Needed" not in text
    sections = text.split("\n## ")[1:]
    assert len(sections) == 6
    assert all(len(section.split("\n", 1)[1].strip()) > 80 for section in sections)


def test_sources_are_read_from_their_hub_ids(hub, published):
    script = """
import datasets, sys
from dataset_builders import read_source
rows = [{"id": "orta-2", "title": "Lake_Orta", "context": "A lake.", "question": "How deep?",
         "answers": {"text": [], "answer_start": []}}]
text = datasets.Value("string")
answers = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int32"))}
features = {"id": text, "title": text, "context": text, "question": text, "answers": answers}
data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
data.push_to_hub("rajpurkar/squad_v2", split="train")
data.push_to_hub("tester/other", "config", split="validation")
for path in (None, "rajpurkar/squad_v2", "tester/other:config@validation"):
    print([(row["sample_idx"], row["answer"]) for row in read_source("squad_v2", path, split="all")])
print([row["sample_idx"] for row in read_source("rows", "tester/mix:squad_v2@train", split="all")])
try:
    list(read_source("squad_v2", "tester/nowhere"))
except ValueError as error:
    print(error)
"""
    lines = run(hub, published, "-c", script).splitlines()
    assert lines[:3] == ["[('orta-2', 'UNANSWERABLE')]"] * 3
    assert lines[3] == "['orta-1', 'orta-2']"
    assert lines[4].startswith("tester/nowhere@train: cannot be read from the Hub")


def test_topiocqa_is_read_from_the_files_of_its_hub_repository(hub, published):
    script = f"""
import json
from huggingface_hub import HfApi
from dataset_builders import read_source
records = json.load(open({str(FIXTURES / "topiocqa.json")!r}))
api = HfApi()
api.create_repo("McGill-NLP/TopiOCQA", repo_type="dataset")
lines = "".join(json.dumps(record) + "\\n" for record in records).encode()
api.upload_file(path_or_fileobj=lines, path_in_repo="data/topiocqa_train.jsonl", repo_id="McGill-NLP/TopiOCQA",
                repo_type="dataset")
for path in (None, "McGill-NLP/TopiOCQA"):
    print([row["sample_idx"] for row in read_source("topiocqa", path, split="all")])
"""
    assert run(hub, published, "-c", script).splitlines() == ["['7-1', '7-2', '7-3']"] * 2


def test_an_unfinished_folder_is_not_published(hub, tmp_path):
    (tmp_path / "half" / "squad_v2").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"half holds no build\.json: it is not a finished build"):
        publish(Release("dataset", "tester", "v1", build=str(tmp_path / "half")), None, dry_run=False)


CLIENT = """
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
api = HfApi()

def raises(kind, call):
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")

for kind in ("model", "dataset", "space", "kernel"):
    repo = f"tester/one-{kind}"
    extra = {"space_sdk": "gradio"} if kind == "space" else {}
    api.create_repo(repo, repo_type=kind, private=kind == "space", **extra)
    raises(HfHubHTTPError, lambda: api.create_repo(repo, repo_type=kind, **extra))
    large = bytes(range(256)) * 40
    api.upload_file(path_or_fileobj=large, path_in_repo="folder/weights.safetensors", repo_id=repo, repo_type=kind)
    first = api.repo_info(repo, repo_type=kind).sha
    api.upload_file(path_or_fileobj=b"text", path_in_repo="README.md", repo_id=repo, repo_type=kind)
    api.create_branch(repo, branch="v1", revision=first, repo_type=kind)
    api.create_tag(repo, tag="release", repo_type=kind)
    assert api.list_repo_files(repo, repo_type=kind) == [".gitattributes", "README.md", "folder/weights.safetensors"]
    assert api.list_repo_files(repo, repo_type=kind, revision="v1") == [".gitattributes", "folder/weights.safetensors"]
    path = hf_hub_download(repo, "folder/weights.safetensors", repo_type=kind, revision="release")
    assert open(path, "rb").read() == large
    refs = api.list_repo_refs(repo, repo_type=kind)
    assert ({r.name for r in refs.branches}, {r.name for r in refs.tags}) == ({"main", "v1"}, {"release"})
    assert len(api.list_repo_commits(repo, repo_type=kind)) == 3
    raises(EntryNotFoundError, lambda: hf_hub_download(repo, "no.txt", repo_type=kind))
    raises(RevisionNotFoundError, lambda: hf_hub_download(repo, "README.md", repo_type=kind, revision="v2"))
    pull = api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=repo, repo_type=kind, create_pr=True)
    assert "x.txt" not in api.list_repo_files(repo, repo_type=kind)
    api.delete_file("README.md", repo, repo_type=kind)
    assert "README.md" not in api.list_repo_files(repo, repo_type=kind)
raises(RepositoryNotFoundError, lambda: HfApi(token=False).repo_info("tester/one-space", repo_type="space"))
api.delete_repo("tester/one-model")
raises(RepositoryNotFoundError, lambda: api.repo_info("tester/one-model"))
print("done")
"""


def test_the_hub_on_loopback_answers_like_one(hub, tmp_path):
    assert run(hub, tmp_path, "-c", CLIENT).splitlines()[-1] == "done"
