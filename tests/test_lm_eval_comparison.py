"""Several processes, and the comparison of methods: what is run, what is not run again, what is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from evaluation_support import checkpoint, metadata, model_arguments, results, samples

from dataset_builders import FEATURES, make_row
from xcllama.evaluation import comparison


def launched(processes: int, arguments: list[str]) -> subprocess.CompletedProcess:
    """The command in one process, or in several on CPU (gloo)."""
    head = [sys.executable]
    if processes > 1:
        head += ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        head += ["--main_process_port", "0"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*head, "-m", "xcllama", "eval", "run", *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cross", "cross_shuffled", "prompt_kv"])
def test_two_processes_agree_with_one(checkpoint, tmp_path, mode):
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = launched(
            processes,
            [*model_arguments(checkpoint, mode), "--tasks", "xc_squad_v2", "--log_samples", "--output_path",
             str(folder), "--metadata", metadata(squad_v2="squad_v2.json")],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        answers = {sample["doc_id"]: sample["resps"] for sample in samples(folder, "xc_squad_v2")}
        figures = results(folder)
        found.append(
            (answers, figures["results"]["xc_squad_v2"]["f1,none"], figures["config"].get("contexts_encoded"))
        )
    assert found[0] == found[1]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(checkpoint, tmp_path):
    rows = [make_row("squad_v2", name, "Why?", ["word " * count], ["so"]) for name, count in (("1", 2), ("2", 3000))]
    Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "test-00000.parquet")
    data = json.dumps({"paths": {"squad_v2": str(tmp_path)}, "split": "test", "bertscore_model": "none"})
    done = launched(2, [*model_arguments(checkpoint, "prompt"), "--tasks", "xc_squad_v2", "--metadata", data])
    assert done.returncode != 0
    assert "Error: task xc_squad_v2: the prompt of document" in done.stderr
    assert "results" not in done.stdout


def test_comparison_plan(tmp_path, checkpoint):
    models = comparison.Models([checkpoint, "org/other"], lora_prompt="adapters/lora")
    methods = models.default_methods()
    assert methods == [*comparison.CROSS, "none", "prompt", "prompt_kv", "lora_prompt"]
    found = []
    for method, evaluation in comparison.plan(models, methods, tmp_path):
        arguments = dict(pair.split("=") for pair in evaluation.options[3].split(","))
        found.append((method, arguments["pretrained"], evaluation.output))
    # each checkpoint reads its own cache; the baselines run once
    assert [entry[1] for entry in found if entry[0] == "cross_int8"] == [checkpoint, "org/other"]
    assert ("prompt", checkpoint, tmp_path / "baselines" / "prompt") in found
    assert ("lora_prompt", "adapters/lora", tmp_path / "baselines" / "lora_prompt") in found
    planned = dict(comparison.plan(comparison.Models([checkpoint]), ["cross", "cross_shuffled"], tmp_path))
    first, second = (planned[name].options for name in ("cross", "cross_shuffled"))
    # right and wrong contexts come from one folder
    folder = first[3].split("context_cache_dir=")[1]
    assert second[3] == f"pretrained={checkpoint},context_mode=cross_shuffled,context_cache_dir={folder}"
    (fid,) = comparison.plan(comparison.Models([], fid="t5"), ["fid"], tmp_path)
    assert fid[1].options[:4] == ("--model", "fid", "--model_args", "pretrained=t5")
    for method in ("lora_closed_book", "fid", "telepathy"):
        with pytest.raises(ValueError, match=f"method '{method}' is unknown or lacks its model"):
            comparison.compare(models, ["none", method], tmp_path, ["xc_coqa"], ["xc_coqa"], [])


def test_what_was_compared_is_not_run_again(tmp_path, checkpoint, monkeypatch):
    calls = []

    def evaluate(call):
        calls.append(call[3:])
        Path(call[call.index("--output_path") + 1]).mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(call, int("xc_drop" in call))

    monkeypatch.setattr(comparison.subprocess, "run", evaluate)
    models = comparison.Models([checkpoint])

    def compare():
        calls.clear()
        failures = comparison.compare(
            models, ["none", "cross_int4"], tmp_path, ["xc_coqa", "xc_drop"], ["xc_coqa"], ["--limit", "2"]
        )
        return failures, [(call[3].split(",")[1], call[call.index("--tasks") + 1]) for call in calls]

    none, control = "context_mode=none", "context_mode=cross"
    assert compare() == (1, [(none, "xc_coqa"), (none, "xc_drop"), (control, "xc_coqa")])
    # what failed is tried again
    assert compare() == (1, [(none, "xc_drop")])
    # other weights read the cache otherwise; the baselines use the same base as before
    (Path(checkpoint) / "more.safetensors").write_bytes(b"x")
    assert compare() == (1, [(none, "xc_drop"), (control, "xc_coqa")])
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    (Path(checkpoint) / "config.json").write_text(json.dumps(config | {"base_model_digest": "other"}))
    assert compare() == (1, [(none, "xc_coqa"), (none, "xc_drop")])


@pytest.mark.slow
def test_comparison_in_one_command(checkpoint, tmp_path):
    call = [sys.executable, "-m", "xcllama", "eval", "compare", "--checkpoint", checkpoint,
            "--output", str(tmp_path / "runs"), "--methods", "cross,none", "--tasks", "xc_squad_v2",
            "--metadata", metadata(squad_v2="squad_v2.json"), "--device", "cpu",
            "--results", str(tmp_path / "results")]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    first, second = (subprocess.run(call, capture_output=True, text=True, env=environment) for _ in range(2))
    assert first.returncode == 0, first.stderr[-2000:]
    assert "xc / cross / float32" in first.stdout
    figures = json.loads((tmp_path / "results" / "eval_xc.json").read_text())
    assert {run["mode"] for run in figures["runs"]} == {"cross", "none"}
    assert [entry["second"] for entry in figures["differences"]] == ["base / none"]
    assert figures["provenance"]["command"].startswith("python")
    assert second.stdout.count("done before") == 2
