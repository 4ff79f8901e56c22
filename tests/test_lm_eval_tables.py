"""Tables from lm-eval's JSON: hand-worked figures, intervals, pairing, and the published numbers kept apart."""

import json

import numpy as np
import pytest

from lm_eval_tasks import tables

F1 = {"cross": [1.0, 0.5, 1.0, 0.0], "cross_shuffled": [0.0, 0.5, 0.0, 0.0]}


def write_run(folder, mode: str, date: float, values: list[float], samples: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    file = f"samples_xc_coqa_{mode}_{date}.jsonl"
    document = {
        "results": {
            "xc_coqa": {
                "alias": "xc_coqa", "f1,none": sum(values) / len(values), "f1_stderr,none": 0.1,
                "cache_bytes,none": 1000.0, "cache_bytes_stderr,none": 5.0,
            }
        },
        "config": {
            "model": "xcllama", "model_args": {"pretrained": "checkpoints/xc"}, "context_mode": mode, "limit": 4,
            "cache_dtype": "int8", "cache_bytes_per_token": 640, "command": f"run {mode}", "torch_seed": 1234,
        },
        "git_hash": "abc", "date": date, "transformers_version": "5",
    }  # fmt: skip
    if samples:
        document["samples_files"] = {"xc_coqa": file}
        lines = [json.dumps({"doc_id": doc, "f1": value}) for doc, value in enumerate(values)]
        (folder / file).write_text("\n".join(lines) + "\n")
    (folder / f"results_{mode}_{date}.json").write_text(json.dumps(document))


@pytest.fixture
def folder(tmp_path):
    for mode, values in F1.items():
        write_run(tmp_path / "model", mode, 100.0, values)
    return tmp_path


def test_runs_in_one_folder_keep_their_own_samples(folder):
    runs = {run.mode: run for run in tables.load_runs([folder])}
    for mode, values in F1.items():
        assert list(runs[mode].samples["f1"].values()) == values
        assert runs[mode].method == f"xc / {mode} / int8"
        assert runs[mode].origin["command"] == f"run {mode}"


def test_the_newest_of_equal_runs_counts(folder):
    write_run(folder / "model", "cross", 200.0, [0.0, 0.0, 0.0, 0.2])
    runs = {run.mode: run for run in tables.load_runs([folder])}
    assert runs["cross"].metrics["f1"][0] == pytest.approx(0.05)
    assert len(runs) == 2


def test_intervals():
    assert tables.bootstrap_interval([0.25] * 9) == (0.25, 0.25)
    values = np.random.default_rng(3).normal(0.5, 0.2, 400)
    low, high = tables.bootstrap_interval(values)
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert tables.bootstrap_interval(values) == (low, high)


def test_without_samples_the_standard_error_serves(tmp_path):
    write_run(tmp_path / "model", "cross", 1.0, [1.0, 0.0], samples=False)
    figure = tables.summarize(tables.load_runs([tmp_path]))["runs"][0]["quality"]["f1"]
    assert figure["from"] == "standard error"
    assert figure["interval"] == pytest.approx((0.5 - 0.196, 0.5 + 0.196))
    assert figure["documents"] is None


def test_differences_are_paired(folder):
    (entry,) = tables.summarize(tables.load_runs([folder]))["differences"]
    # document by document: 1, 0, 1, 0
    assert entry["difference"] == 0.5
    assert entry["documents"] == 4
    low, high = entry["interval"]
    assert 0.0 <= low < 0.5 < high <= 1.0
    assert entry["first"].startswith("xc / cross /")


def test_markdown(folder):
    text = tables.markdown(tables.summarize(tables.load_runs([folder])))
    measured, published = text.split("## Published")
    assert "| xc / cross / int8 | 0.625 [" in measured
    assert "640" in measured
    assert "+0.500 [" in measured
    # the paper's numbers stand in their own section only
    assert "63.1" in published
    assert "63.1" not in measured
    assert "not measured here" in published


def test_a_folder_without_results_says_so(tmp_path):
    with pytest.raises(ValueError, match="no results_.*--output_path"):
        tables.load_runs([tmp_path])
