"""Tables from lm-eval's JSON: hand-worked figures, intervals, pairing, and the published numbers kept apart."""

import json

import numpy as np
import pytest

from xcllama.evaluation import tables
from xcllama.evaluation.plots import draw

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
            "cache_dtype": "bfloat16", "cache_bytes_per_token": 640, "provenance": {"command": f"run {mode}"},
            "contexts_encoded": 3,
        },
        "date": date,
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
        assert runs[mode].method == f"xc / {mode} / bfloat16"
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
    assert "| xc / cross / bfloat16 | 0.625 [" in measured
    assert "640" in measured
    assert "+0.500 [" in measured
    # the paper's numbers stand in their own section only
    assert "63.1" in published
    assert "63.1" not in measured
    assert "not measured here" in published


def run(model: str, mode: str, values: list[float], dtype: str | None = None) -> tables.Run:
    samples = {"f1": dict(enumerate(values))}
    metrics = {"f1": (sum(values) / len(values), None)}
    return tables.Run("xc_coqa", model, "base", mode, dtype, metrics, samples, {}, {})


@pytest.fixture
def comparison():
    return [
        run("xc", "cross", [0.6, 0.4], "bfloat16"),
        run("xc", "cross", [0.6, 0.38], "int8"),
        run("xc", "cross", [0.5, 0.4], "int4"),
        run("xc", "cross_shuffled", [0.2, 0.2], "bfloat16"),
        run("xc-condensed", "cross", [0.5, 0.47], "bfloat16"),
        run("base", "prompt", [0.3, 0.5]),
        run("base", "none", [0.0, 0.1]),
        run("lora-prompt", "LoRA / prompt", [0.8, 0.6]),
        run("lora-closed-book", "LoRA / none", [0.2, 0.0]),
    ]


def test_targets_by_hand(comparison):
    found = {(row["model"], row["target"]): row for row in tables.summarize(comparison)["targets"]}
    for model, target, value, required, met in [
        ("xc", "F1 of the untuned prompt", 0.5, 0.4, True),
        ("xc", "share of the LoRA prompt's F1", 0.5 / 0.7, 0.75, False),
        # 0.5 - 0.2 against half of 0.7 - 0.1
        ("xc", "F1 over another document's cache", 0.3, 0.3, True),
        ("xc", "F1 lost by int8", 0.01, 0.005, False),
        ("xc", "F1 lost by int4", 0.05, 0.02, False),
        ("xc-condensed", "F1 lost by the condensed layout", 0.015, 0.02, True),
        ("xc-condensed", "share of the LoRA prompt's F1", 0.485 / 0.7, 0.75, False),
    ]:
        row = found.pop((model, target))
        assert (row["value"], row["required"]) == pytest.approx((value, required))
        assert row["met"] == met or value == pytest.approx(required)
    assert [model for model, _ in found] == ["xc-condensed"]


def test_what_is_subtracted_from_what(comparison):
    pairs = [(entry["first"], entry["second"]) for entry in tables.differences(comparison)]
    own = [(first, second) for first, second in pairs if first.startswith("xc / cross")]
    assert own == [
        ("xc / cross / bfloat16", "xc / cross_shuffled / bfloat16"),
        ("xc / cross / bfloat16", "base / prompt"),
        ("xc / cross / bfloat16", "base / none"),
        ("xc / cross / bfloat16", "lora-prompt / LoRA / prompt"),
        ("xc / cross / int8", "xc / cross / bfloat16"),
        ("xc / cross / int4", "xc / cross / bfloat16"),
    ]
    assert ("xc-condensed / cross / bfloat16", "xc / cross / bfloat16") in pairs
    assert ("lora-prompt / LoRA / prompt", "lora-closed-book / LoRA / none") in pairs
    assert ("base / prompt", "base / none") in pairs
    assert len(pairs) == len(own) + 6


def test_plot(comparison, tmp_path):
    summary = tables.summarize(comparison[3:])
    sizes = {"cross": 1152, "cross_shuffled": 1152, "prompt": 23040, "LoRA / prompt": 23040}
    for entry in summary["runs"]:
        entry["cost"]["cache_bytes_per_token"] = sizes.get(entry["mode"])
    draw(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / ".plot.png.partial").exists()
    with pytest.raises(ValueError, match="nothing to plot"):
        draw({"runs": []}, tmp_path / "none.png")


def test_baselines_bear_the_name_of_the_base(tmp_path):
    write_run(tmp_path / "model", "prompt", 1.0, [1.0])
    (path,) = tmp_path.rglob("results_*.json")
    document = json.loads(path.read_text())
    document["config"] |= {"base_model": "org/base", "cache_dtype": None}
    path.write_text(json.dumps(document))
    assert tables.load_runs([tmp_path])[0].method == "base / prompt"
    document["config"] |= {"adapter": "runs/lora-prompt/export"}
    document["config"]["model_args"] = {"pretrained": "runs/lora-prompt/export"}
    path.write_text(json.dumps(document))
    (found,) = tables.load_runs([tmp_path])
    assert (found.method, found.base) == ("lora-prompt / LoRA / prompt", "base")


def test_a_folder_without_results_says_so(tmp_path):
    with pytest.raises(ValueError, match="no results_.*--output_path"):
        tables.load_runs([tmp_path])
