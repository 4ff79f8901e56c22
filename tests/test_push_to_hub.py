"""Every kind of repository published by the command, then used by its own client in a new, clean process."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from publishing_support import TOKEN, hub_on_loopback, make_checkpoint

from xcllama.commands import main
from xcllama.publishing.checking import run_clean
from xcllama.store import ContextStore

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
NAME = "xc-smollm2-135m"

READ_BACK = """
import datasets, kernels, torch
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
repo, question, text = "tester/xc-smollm2-135m", "Who?", "Margaret Hale."
model = AutoModelForCausalLM.from_pretrained(repo, revision="v0.1.0", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, revision="v0.1.0", trust_remote_code=True)
found = {"type": type(model).__module__.split(".")[0], "digest": model.base_digest()}
try:
    HfApi(token=False).model_info(repo)
except RepositoryNotFoundError as error:
    found["stranger"] = type(error).__name__
inputs = processor(text=[question], return_tensors="pt")
sys.path.append({root!r})
from xcllama.store import ContextStore, DamagedDocumentError
store = ContextStore.open("tester/xcllama-passages", model, processor, revision="v0.1.0")
found["ids"] = sorted(store.ids())
cache = store.get(found["ids"])
options = {"max_new_tokens": 5, "do_sample": False}
found["texts"] = [store.text(name)[0] for name in found["ids"]]
found["tokens"] = model.generate(**inputs, context_cache=cache.select([2]), **options).tolist()
try:
    moved = ContextStore.open("tester/xcllama-passages", model, processor, revision="moved", cache_folder="moved")
    moved.get(found["ids"])
except DamagedDocumentError as error:
    found["altered"] = error.ids
generating = pipeline("text-generation", model=repo, revision="v0.1.0", trust_remote_code=True)
generated = generating([question], context_cache=cache.select([2]), return_full_text=False, **options)
found["generated"] = generated[0][0]["generated_text"]
answering = pipeline("context-question-answering", model=repo, revision="v0.1.0", trust_remote_code=True)
found["answers"] = len(answering([question], contexts=text)["answers"])
kernel = kernels.get_kernel("tester/xcllama-kernels", version=1, trust_remote_code=True)
found["kernel"] = sorted(kernel.__all__)
states = torch.randn(6, 1, 16)
output = kernel.cross_attention(torch.randn(1, 1, 2, 16), states, states, torch.tensor([0, 6]), torch.tensor([0]))
found["shape"] = list(output.shape)
rows = datasets.load_dataset("tester/xcllama-mix", revision="v0.1.0")
found["rows"] = {split: len(part) for split, part in rows.items()}
space = snapshot_download("tester/xcllama-demo", repo_type="space")
found["space"] = sorted(path.name for path in __import__("pathlib").Path(space).glob("*.py"))
print(json.dumps(found))
"""


def push(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `xcllama publish`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["xcllama", "publish", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return (end.value.code, *capsys.readouterr())


def test_all_kinds_there_and_back(tmp_path, monkeypatch, capsys):
    """Five private repositories, one commit and one tag each; what is loaded by id and tag is what was published."""
    cache_folder, fixtures = tmp_path / "cache", TESTS / "fixtures"
    monkeypatch.setenv("XCLLAMA_CACHE", str(cache_folder))
    checkpoint = make_checkpoint(cache_folder, tmp_path / NAME)
    build = ["--source", "mix", "--mix-of", "squad_v2", "hotpotqa", "--benchmarks", "repliqa"]
    build += ["--path", f"squad_v2={fixtures / 'squad_v2.json'}", "--path", f"repliqa={fixtures / 'repliqa.jsonl'}"]
    build += ["--path", f"hotpotqa={fixtures / 'hotpotqa_distractor.json'}", "--output", str(tmp_path / "mix")]
    monkeypatch.setattr(sys, "argv", ["build_dataset.py", *build])
    monkeypatch.syspath_prepend(ROOT / "scripts")
    assert importlib.import_module("build_dataset").main() == 0
    arguments = [
        "--namespace",
        "tester",
        "--checkpoint",
        str(checkpoint),
        "--build",
        str(tmp_path / "mix"),
        "--private",
    ]
    with hub_on_loopback(tmp_path) as server:
        status, out, err = push(monkeypatch, capsys, "all", *arguments, "--output", str(tmp_path / "out"))
        assert status == 0, err
        assert out.count("published http://127.0.0.1") == 5
        assert TOKEN not in out + err
        api = HfApi()
        kinds = {NAME: "model", "xcllama-kernels": "kernel", "xcllama-mix": "dataset"}
        kinds |= {"xcllama-passages": "dataset", "xcllama-demo": "space"}
        for name, kind in kinds.items():
            where = {"repo_id": f"tester/{name}", "repo_type": kind}
            refs = api.list_repo_refs(**where)
            (branch,) = (ref for ref in refs.branches if ref.name == ("v1" if kind == "kernel" else "main"))
            assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v0.1.0", branch.target_commit)]
            # what creating the repository makes, and one more
            assert len(api.list_repo_commits(**where, revision=branch.name)) == 2
            # nothing that a check left behind
            assert not [name for name in api.list_repo_files(**where, revision=branch.name) if "__pycache__" in name]
        # the Hub shows a kernel's main branch: its card, which every version shares
        card = (tmp_path / "out" / "kernel" / "xcllama-kernels" / "README.md").read_text()
        where = {"repo_id": "tester/xcllama-kernels", "repo_type": "kernel"}
        assert Path(api.hf_hub_download(**where, filename="README.md")).read_text() == card
        assert set(api.list_repo_files(**where)) == {".gitattributes", "README.md"}
        # the branches move on, and one shard is altered: the tag does not care
        api.upload_file(path_or_fileobj=b"x", path_in_repo="config.json", repo_id=f"tester/{NAME}")
        where = {"repo_id": "tester/xcllama-passages", "repo_type": "dataset"}
        shard = next(name for name in api.list_repo_files(**where) if name.startswith("shards/"))
        content = bytearray((tmp_path / "out" / "dataset" / "xcllama-passages" / shard).read_bytes())
        content[-1] ^= 1
        api.create_branch(**where, branch="moved")
        api.upload_file(path_or_fileobj=bytes(content), path_in_repo=shard, revision="moved", **where)
        environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        environment |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        code = READ_BACK.replace("{root!r}", repr(str(ROOT)))
        found = run_clean(code, TRITON_INTERPRET="1", **environment)
    check_read_back(found, checkpoint, tmp_path)


def check_read_back(found: dict, checkpoint: Path, folder: Path) -> None:
    """What the new process saw is what the sources are."""
    from xcllama.models import load_model

    model, processor = load_model(checkpoint)
    assert found["type"] == "transformers_modules"
    assert found["stranger"] == "RepositoryNotFoundError"
    assert found["digest"] == model.base_digest()
    files = sorted((ROOT / "scripts" / "passages").glob("*.json"))
    texts = {path.stem: json.loads(path.read_text())["text"] for path in files}
    assert dict(zip(found["ids"], found["texts"], strict=True)) == texts
    with ContextStore(folder / "again", model, processor) as store:
        store.add(texts.keys(), texts.values())
        cache = store.get(found["ids"][2])
    inputs = processor(text=["Who?"], return_tensors="pt")
    expected = model.generate(**inputs, context_cache=cache, max_new_tokens=5, do_sample=False)
    assert found["tokens"] == expected.tolist()
    assert found["generated"]
    assert found["answers"] == 1
    assert found["altered"]
    assert set(found["altered"]) < set(texts)
    assert "cross_attention" in found["kernel"]
    assert found["shape"] == [1, 1, 2, 16]
    table = json.loads((folder / "mix" / "build.json").read_text())
    assert found["rows"] == {split: counts["rows"] for split, counts in table["configs"]["mix"]["splits"].items()}
    assert "app.py" in found["space"]
