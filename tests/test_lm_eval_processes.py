"""lm-eval in several processes: they agree with one, and an error in one ends all."""

import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset
from evaluation_support import checkpoint, metadata, model_arguments, results, samples

from dataset_builders import FEATURES, make_row


def launched(processes: int, arguments: list[str]) -> subprocess.CompletedProcess:
    """The command in one process, or in several on CPU (gloo)."""
    head = [sys.executable]
    if processes > 1:
        head += ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        head += ["--main_process_port", "0"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*head, "-m", "xcllama.evaluation", *arguments], capture_output=True, text=True, env=environment
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
    assert "error: task xc_squad_v2: the prompt of document" in done.stderr
    assert "results" not in done.stdout
