"""What the project aims at, computed from the figures of an evaluation: each with its value, and whether it is met."""

from collections.abc import Iterator, Sequence
from typing import Any

# cross-attention reads as well as a LoRA that has the text in its prompt, at least up to this share of its F1
SHARE_OF_LORA = 0.75
# largest losses of F1
LOSS = {"condensed": 0.02, "int8": 0.005, "int4": 0.02}
CONDENSED = "-condensed"


def targets(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets of each checkpoint and task whose runs are there.

    Args:
        runs: entries of `summarize`, of one base.

    Returns:
        Rows with task, model, target, value, relation (">=" or "<="), required, met.
    """
    scores = {}
    for run in runs:
        if "f1" in run["quality"]:
            key = (run["task"], run["model"] if run["mode"].startswith("cross") else None, run["mode"])
            scores[*key, run["cache_dtype"]] = run["quality"]["f1"]["value"]
    rows = []
    for (task, model, mode, dtype), score in scores.items():
        if mode == "cross" and dtype not in LOSS:
            rows += [{"task": task, "model": model, **row} for row in _of(scores, task, model, dtype, score)]
    return rows


def _of(scores: dict[tuple, float], task: str, model: str, dtype: str, cross: float) -> Iterator[dict[str, Any]]:
    prompt = scores.get((task, None, "prompt", None))
    adapted = scores.get((task, None, "LoRA / prompt", None))
    closed = scores.get((task, None, "LoRA / none", None))
    shuffled = scores.get((task, model, "cross_shuffled", dtype))
    if prompt is not None:
        yield _at_least("F1 of the untuned prompt", cross, prompt)
    if adapted:
        yield _at_least("share of the LoRA prompt's F1", cross / adapted, SHARE_OF_LORA)
    if None not in (adapted, closed, shuffled):
        yield _at_least("F1 over another document's cache", cross - shuffled, (adapted - closed) / 2)
    for other in ("int8", "int4"):
        if (quantized := scores.get((task, model, "cross", other))) is not None:
            yield _at_most(f"F1 lost by {other}", cross - quantized, LOSS[other])
    hidden = scores.get((task, model.removesuffix(CONDENSED), "cross", dtype))
    if model.endswith(CONDENSED) and hidden is not None:
        yield _at_most("F1 lost by the condensed layout", hidden - cross, LOSS["condensed"])


def _at_least(target: str, value: float, required: float) -> dict[str, Any]:
    return {"target": target, "value": value, "relation": ">=", "required": required, "met": value >= required}


def _at_most(target: str, value: float, required: float) -> dict[str, Any]:
    return {"target": target, "value": value, "relation": "<=", "required": required, "met": value <= required}
