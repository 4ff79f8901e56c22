"""From records to figures: paired intervals, what is not in the text, targets, tables and the picture, by hand."""

import json

import numpy as np
import pytest

from xcllama.evaluation import bootstrap, tables
from xcllama.evaluation.not_in_text import not_in_text, store_threshold, stored_threshold, threshold_of
from xcllama.evaluation.plots import draw

F1 = {
    ("none", "base"): [0.0, 0.1],
    ("prompt", "base"): [0.3, 0.5],
    ("lora_prompt", "lora-prompt"): [0.8, 0.6],
    ("cross", "xc"): [0.7, 0.5],
    ("cross_joined4", "xc"): [0.7, 0.4],
    ("cross_int8", "xc"): [0.7, 0.48],
    ("cross_shuffled", "xc"): [0.1, 0.1],
    ("cross", "xc-condensed"): [0.6, 0.55],
    ("cross", "xc-enc-minilm"): [0.5, 0.3],
}


def record(index: int, f1: float, scores: list[float]) -> dict:
    quality = dict.fromkeys(tables.QUALITY, f1) | {"id": str(index), "token_scores": scores}
    return quality | {"context_tokens": 10 + index, "prompt_tokens": 20}


def write_run(folder, way: str, model: str, records: list[dict], split: str = "test"):
    path = folder / model / f"{way}.json"
    path.parent.mkdir(exist_ok=True)
    key = {"source": "squad_sample", "split": split, "limit": None}
    size = {"cache": 1152, "prompt": 23040, "nothing": None}[tables.METHODS[way].reads]
    values = {"method": way, "model": model, "key": key, "added_digest": "abc"}
    values |= {"cache_bytes_per_token": size, "resident_bytes_per_token": size, "seconds_per_question": 0.5}
    values |= {"provenance": {"commit": "c0ffee", "command": f"python {way}", "date": "2026-01-01"}}
    path.write_text(json.dumps(values))
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    return path


@pytest.fixture
def summary(tmp_path):
    paths = [
        write_run(tmp_path, way, model, [record(i, value, [-0.1, -0.3]) for i, value in enumerate(values)])
        for (way, model), values in F1.items()
    ]
    absent = [record(i, 0.0, [-0.2, score]) for i, score in enumerate((-0.1, -2.0))]
    paths.append(write_run(tmp_path, "cross_absent", "xc", absent))
    return tables.summarize(tables.load_runs(paths), {"xc": 0.5})


def test_mean_and_its_interval():
    found = bootstrap.mean([0.25] * 9)
    assert (found.low, found.value, found.high) == pytest.approx((0.25, 0.25, 0.25))
    values = np.random.default_rng(3).normal(0.5, 0.2, 400)
    found, error = bootstrap.mean(values), values.std(ddof=1) / 20
    assert found.value == values.mean()
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert bootstrap.mean(values) == found


def test_differences_and_ratios_are_paired():
    questions = np.random.default_rng(0).uniform(0.2, 1, 200)
    # 0.1 more of every question, whatever questions are drawn
    found = bootstrap.difference(questions + 0.1, questions)
    assert (found.low, found.value, found.high) == pytest.approx((0.1, 0.1, 0.1))
    found = bootstrap.ratio(0.8 * questions, questions)
    assert (found.low, found.value, found.high) == pytest.approx((0.8, 0.8, 0.8))
    # questions that are not the same pair spread
    spread = bootstrap.difference(questions + 0.1, questions[::-1])
    assert spread.high - spread.low > 0.05
    # of two questions a resample draws one alone: 1/1 and 0/1
    found = bootstrap.ratio([1.0, 0.0], [1.0, 1.0])
    assert (found.low, found.value, found.high) == (0.0, 0.5, 1.0)
    assert bootstrap.ratio([1.0, 1.0], [1.0, 0.0]) is None


def test_area_under_the_curve():
    # 3 above 1 and 2 (two wins), 2 above 1 and tied with 2: 3.5 of 4
    assert bootstrap.auroc([3.0, 2.0], [1.0, 2.0]).value == 0.875
    assert bootstrap.auroc([0.0, 1.0], [2.0, 3.0]) == bootstrap.Estimate(0.0, 0.0, 0.0, 2)
    generator = np.random.default_rng(1)
    found = bootstrap.auroc(generator.normal(1, 1, 300), generator.normal(0, 1, 300))
    # of two normals one deviation apart: 0.76
    assert found.low < 0.76 < found.high
    assert 0.03 < found.high - found.low < 0.12


def test_threshold():
    scores = [0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.6, 0.4, 1.0]
    assert threshold_of(scores) == 0.2
    assert sum(score < threshold_of(scores) for score in scores) == 1
    assert threshold_of(scores, 0.35) == 0.4
    assert threshold_of(scores[:9]) == 0.1


def test_not_in_text_by_hand():
    right = [record(0, 1.0, [-0.1, -0.1]), record(1, 0.5, [-0.5, -3.0]), record(2, 0.8, [-0.2])]
    absent = [record(0, 0.0, [-0.3, -0.3]), record(1, 0.0, [-0.6, -4.0])]
    found = not_in_text(right, absent, threshold=0.5)
    # question 2 has no passage that does not answer it: -0.1 above both, -1.75 above -2.3 alone
    assert [found["auroc"][name]["value"] for name in ("mean", "minimum", "first")] == [0.75, 0.75, 0.75]
    assert found["auroc"]["mean"]["documents"] == 2
    # exp(-0.3) is above a half, exp(-2.3) below; of the right ones exp(-1.75) is
    assert found["declined"]["value"] == 0.5
    assert found["answerable_lost"]["value"] == pytest.approx(1 / 3)
    assert found["f1_with_declined"]["value"] == pytest.approx(0.6)
    assert not found["threshold_chosen_here"]
    own = not_in_text(right, absent, None)
    assert own["threshold_chosen_here"]
    assert own["threshold"] == pytest.approx(np.exp(-1.75))
    assert own["answerable_lost"]["value"] == 0.0


def test_a_threshold_is_chosen_on_dev_and_kept_in_the_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints" / "xc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 32}')
    assert stored_threshold(str(folder)) is None
    records = [record(i, 1.0, [-0.1 * i]) for i in range(10)]
    runs = tables.load_runs([write_run(tmp_path, "cross", "xc", records, split="dev"),
                             write_run(tmp_path, "cross_absent", "xc", records, split="dev")])  # fmt: skip
    # one of ten lies below
    assert store_threshold(str(folder), tables.answers_of(runs, str(folder))) == pytest.approx(np.exp(-0.8), abs=1e-4)
    assert json.loads((folder / "config.json").read_text()) == {"hidden_size": 32, "answer_threshold": 0.4493}
    (entry,) = tables.summarize(runs, {"xc": stored_threshold(str(folder))})["not_in_text"]
    assert entry["threshold_chosen_here"]
    on_test = tables.load_runs([write_run(tmp_path, "cross", "xc", records)])
    with pytest.raises(ValueError, match="needs its answers by the method 'cross' on the split 'dev'"):
        tables.answers_of(on_test, str(folder))


def test_entries(summary):
    found = {run["method"]: run for run in summary["runs"]}
    assert "xc / cross / int8" in found
    assert not [method for method in found if "absent" in method]
    entry = found["xc / cross_joined4 / bfloat16"]
    assert entry["quality"]["f1"]["value"] == pytest.approx(0.55)
    assert entry["quality"]["f1"]["documents"] == 2
    assert (entry["mode"], entry["cost"]["context_tokens"]) == ("cross_joined4", 10.5)
    assert entry["origin"]["command"] == "python cross_joined4"
    assert found["lora-prompt / LoRA / prompt"]["mode"] == "LoRA / prompt"


def test_what_is_subtracted_from_what(summary):
    found = {(entry["first"], entry["second"]): entry for entry in summary["differences"]}
    cross = "xc / cross / bfloat16"
    others = ("base / none", "base / prompt", "lora-prompt / LoRA / prompt", "xc / cross_shuffled / bfloat16")
    assert {second for first, second in found if first == cross} == set(others)
    changed = ("xc / cross_joined4 / bfloat16", "xc / cross / int8", "xc-condensed / cross / bfloat16",
               "xc-enc-minilm / cross / bfloat16")  # fmt: skip
    assert {first for first, second in found if second == cross} == set(changed)
    entry = found[cross, "lora-prompt / LoRA / prompt"]
    assert entry["difference"] == pytest.approx(-0.1)
    assert entry["ratio"]["value"] == pytest.approx(0.6 / 0.7)
    assert entry["documents"] == 2


def test_targets_by_hand(summary):
    found = {(row["model"], row["target"]): row for row in summary["targets"]}
    for model, target, value, required, met in [
        ("xc", "share of the LoRA prompt's F1", 0.6 / 0.7, 0.85, True),
        ("xc", "F1", 0.6, 0.42, True),
        ("xc", "F1 lost by joined4", 0.05, 0.04, False),
        ("xc", "F1 lost by int8", 0.01, 0.005, False),
        ("xc-condensed", "share of the LoRA prompt's F1", 0.575 / 0.7, 0.85, False),
        ("xc-condensed", "F1 lost by the condensed layout", 0.025, 0.02, False),
        ("xc-enc-minilm", "share of the LoRA prompt's F1", 0.4 / 0.7, 0.6, False),
        # exp(-0.2) against exp(-0.15) and exp(-1.1): one below, one above
        ("xc", "AUROC of the score, right against wrong passage", 0.5, 0.9, False),
        ("xc", "declined of what is not in the text", 0.5, 0.6, False),
        ("xc", "declined of the answerable", 0.0, 0.1, True),
    ]:
        row = found.pop((model, target))
        assert (row["value"], row["required"], row["met"]) == (pytest.approx(value), required, met)
    assert not found


def test_markdown(summary):
    measured, published = tables.markdown(summary).split("## Published")
    assert "| xc / cross / bfloat16 | 0.600 [0.500, 0.700] |" in measured
    assert "| xc / cross / bfloat16 | squad_sample | 0.500 [" in measured
    assert "xc / cross / bfloat16 - base / prompt | +0.200 [" in measured
    assert "1152" in measured
    # the paper's numbers stand in their own section only
    assert "63.1" in published
    assert "63.1" not in measured
    assert "not measured here" in published


def test_picture(summary, tmp_path):
    draw(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / ".plot.png.partial").exists()
    with pytest.raises(ValueError, match="nothing to plot"):
        draw({"runs": []}, tmp_path / "none.png")
