"""What the project aims at, computed from a comparison: each aim with its value, and whether it is met."""

from collections.abc import Iterator, Sequence
from typing import Any

# of the F1 of a LoRA that has the text in its prompt; of the same by a separate encoder
SHARE_OF_LORA, SHARE_OF_LORA_ENCODER = 0.85, 0.6
LEAST_F1 = 0.42
# largest losses of F1
LOSS = {"joined4": 0.04, "joined16": 0.10, "int8": 0.005, "int4": 0.015}
CONDENSED, CONDENSED_LOSS = "-condensed", 0.02
ENCODER = "-enc-"
DECLINED, LOST, AUROC = 0.6, 0.10, 0.9


def targets(runs: Sequence[dict[str, Any]], not_in_text: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The targets of each checkpoint and task whose runs are there.

    Args:
        runs, not_in_text: entries of `tables.summarize`, of one base.

    Returns:
        Rows with task, model, target, value, relation (">=" or "<="), required, met.
    """
    scores = {}
    for run in runs:
        model = run["model"] if run["mode"].startswith("cross") else None
        scores[run["task"], model, run["mode"], run["cache_dtype"]] = run["quality"]["f1"]["value"]
    rows = []
    for (task, model, mode, dtype), score in scores.items():
        if mode == "cross" and dtype not in LOSS:
            rows += [{"task": task, "model": model, **row} for row in _of_answers(scores, task, model, dtype, score)]
    for entry in not_in_text:
        if entry["mode"] == "cross":
            rows += [{"task": entry["task"], "model": entry["model"], **row} for row in _of_absence(entry)]
    return rows


def _of_answers(scores: dict[tuple, float], task: str, model: str, dtype: str, cross: float) -> Iterator[dict]:
    adapted = scores.get((task, None, "LoRA / prompt", None))
    encoder = ENCODER in model
    if adapted:
        share = SHARE_OF_LORA_ENCODER if encoder else SHARE_OF_LORA
        yield _at_least("share of the LoRA prompt's F1", cross / adapted, share)
    if model.endswith(CONDENSED):
        hidden = scores.get((task, model.removesuffix(CONDENSED), "cross", dtype))
        if hidden is not None:
            yield _at_most("F1 lost by the condensed layout", hidden - cross, CONDENSED_LOSS)
    elif not encoder:
        yield _at_least("F1", cross, LEAST_F1)
    for name, most in LOSS.items():
        other = ("cross", name) if name.startswith("int") else (f"cross_{name}", dtype)
        if (score := scores.get((task, model, *other))) is not None:
            yield _at_most(f"F1 lost by {name}", cross - score, most)


def _of_absence(entry: dict[str, Any]) -> Iterator[dict]:
    yield _at_least("AUROC of the score, right against wrong passage", entry["auroc"]["mean"]["value"], AUROC)
    if not entry["threshold_chosen_here"]:
        yield _at_least("declined of what is not in the text", entry["declined"]["value"], DECLINED)
        yield _at_most("declined of the answerable", entry["answerable_lost"]["value"], LOST)


def _at_least(target: str, value: float, required: float) -> dict[str, Any]:
    return {"target": target, "value": value, "relation": ">=", "required": required, "met": value >= required}


def _at_most(target: str, value: float, required: float) -> dict[str, Any]:
    return {"target": target, "value": value, "relation": "<=", "required": required, "met": value <= required}
