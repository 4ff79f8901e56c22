"""From the records of a comparison to figures and tables: quality, cost, paired differences, what is not in the text.

runs = load_runs(compare(models, methods, settings, output))
print(markdown(summarize(runs)))
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xcllama.evaluation import bootstrap
from xcllama.evaluation.comparison import METHODS, MODES
from xcllama.evaluation.metrics import ANSWER_METRICS
from xcllama.evaluation.not_in_text import not_in_text
from xcllama.evaluation.targets import targets

QUALITY = (*ANSWER_METRICS, "answer_loss")
COST = ("cache_bytes_per_token", "resident_bytes_per_token", "seconds_per_question")
COUNTS = ("context_tokens", "prompt_tokens")
PUBLISHED = Path(__file__).parent / "published.json"
ABSENT = "_absent"
# the split on whose questions choices are made
CHOICES = "dev"
# methods of which the first minus the second, and the first over the second, says something
PAIRS = (
    *(("cross", other) for other in ("none", "prompt", "lora_closed_book", "lora_prompt", "cross_shuffled")),
    *((f"cross_{changed}", "cross") for changed in ("joined4", "joined16", "int8", "int4")),
    *((f"cross_joined{count}", f"lora_prompt_joined{count}") for count in (4, 16)),
    *(("prompt", "none"), ("lora_prompt", "prompt"), ("lora_prompt", "lora_closed_book")),
)


@dataclass(frozen=True)
class Run:
    """What one method answered.

    Args:
        task: the source of the questions.
        way: a key of `METHODS`.
        model: name of the folder that answered, or of the base where nothing was added.
        figures: of the run's JSON.
        records: of the questions, by id.
    """

    task: str
    way: str
    model: str
    figures: dict[str, Any]
    records: dict[str, dict[str, Any]]

    @property
    def mode(self) -> str:
        """How it read, its cache's dtype aside; "LoRA / ..." with an adapter."""
        kind = METHODS[self.way].model
        if kind in MODES:
            return MODES[kind] + self.way.removeprefix(kind)
        return self.way.removesuffix("_int8").removesuffix("_int4")

    @property
    def cache_dtype(self) -> str | None:
        """Of the cached states; None where nothing is cached."""
        return METHODS[self.way].cache_dtype

    @property
    def method(self) -> str:
        """What a table's row is called."""
        return " / ".join(part for part in (self.model, self.mode, self.cache_dtype) if part)

    def values(self, metric: str, ids: Iterable[str]) -> list[float]:
        """A metric of some questions."""
        return [self.records[i][metric] for i in ids]


def load_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs of `compare`, each with its records."""
    runs = []
    for path in paths:
        figures = json.loads(path.read_text())
        lines = path.with_suffix(".jsonl").read_text().splitlines()
        records = {record["id"]: record for record in map(json.loads, lines)}
        runs.append(Run(figures["key"]["source"], figures["method"], figures["model"], figures, records))
    return runs


def answers_of(runs: Sequence[Run], folder: str) -> list[dict[str, Any]]:
    """The records from which a checkpoint's threshold is chosen: answers from its own cache on the split dev.

    Raises:
        ValueError: there are none.
    """
    run = next((run for run in runs if (run.way, run.model) == ("cross", Path(folder).name)), None)
    if run is None or run.figures["key"]["split"] != CHOICES:
        raise ValueError(f"a threshold for {folder} needs its answers by the method 'cross' on the split {CHOICES!r}.")
    return list(run.records.values())


def summarize(runs: Sequence[Run], thresholds: dict[str, float | None] | None = None) -> dict[str, Any]:
    """Figures of all runs, paired differences, what the project aims at, and the published figures apart.

    Args:
        thresholds: model -> what its answers were declined below, chosen on the split for choices; on that split, and
            without one, a threshold is chosen on the answers themselves.
    """
    shown = [run for run in runs if not run.way.endswith(ABSENT)]
    entries = [_entry(run) for run in sorted(shown, key=lambda run: (run.task, run.method))]
    absence = [entry for run in runs if (entry := _absence(run, runs, thresholds or {})) is not None]
    return {
        "runs": entries,
        "differences": differences(shown),
        "not_in_text": absence,
        "targets": targets(entries, absence),
        "published": json.loads(PUBLISHED.read_text()),
    }


def _entry(run: Run) -> dict[str, Any]:
    quality = {metric: bootstrap.mean(run.values(metric, run.records)).as_dict() for metric in QUALITY}
    counts = {name: float(np.mean(run.values(name, run.records))) for name in COUNTS}
    key, origin = run.figures["key"], run.figures["provenance"]
    return {
        "task": run.task,
        "method": run.method,
        "model": run.model,
        "mode": run.mode,
        "cache_dtype": run.cache_dtype,
        "added_digest": run.figures["added_digest"],
        "split": key["split"],
        "limit": key["limit"],
        "quality": quality,
        "cost": counts | {name: run.figures[name] for name in COST},
        "origin": {name: origin.get(name) for name in ("command", "commit", "dirty", "date", "machine")},
    }


def _absence(run: Run, runs: Sequence[Run], thresholds: dict[str, float | None]) -> dict[str, Any] | None:
    """The figures of a run on passages that do not answer, with the run on those that do."""
    way = run.way.removesuffix(ABSENT)
    right = next((r for r in runs if (r.task, r.model, r.way) == (run.task, run.model, way)), None)
    if way == run.way or right is None:
        return None
    threshold = None if run.figures["key"]["split"] == CHOICES else thresholds.get(run.model)
    found = not_in_text(list(right.records.values()), list(run.records.values()), threshold)
    return {"task": run.task, "method": right.method, "model": run.model, "mode": right.mode, **found}


def differences(runs: Sequence[Run], metric: str = "f1") -> list[dict[str, Any]]:
    """Paired differences and ratios of a metric, over the questions that both methods answered."""
    found = []
    for first in runs:
        for second in runs:
            if first.task != second.task or not _compared(first, second):
                continue
            both = sorted(first.records.keys() & second.records.keys())
            pair = first.values(metric, both), second.values(metric, both)
            difference = bootstrap.difference(*pair)
            entry = {"task": first.task, "first": first.method, "second": second.method, "metric": metric}
            entry |= {"difference": difference.value, "interval": [difference.low, difference.high]}
            ratio = bootstrap.ratio(*pair)
            found.append(entry | {"ratio": ratio and ratio.as_dict(), "documents": len(both)})
    return found


def _compared(first: Run, second: Run) -> bool:
    """Whether `first` minus `second` says something."""
    if first.way == second.way == "cross":
        return first.model > second.model
    own = METHODS[first.way].model == METHODS[second.way].model == "checkpoints"
    return (first.way, second.way) in PAIRS and (not own or first.model == second.model)


def markdown(summary: dict[str, Any]) -> str:
    """The tables of a summary."""
    runs = summary["runs"]
    parts = ["## Measured here\n"]
    parts += ["F1 (95 % bootstrap interval over questions)\n", _quality_table(runs)]
    parts += ["Cost, means over the questions of all tasks\n", _cost_table(runs)]
    if summary["differences"]:
        parts += ["Paired differences and ratios on the same questions\n", _difference_table(summary["differences"])]
    if summary["not_in_text"]:
        parts += ["Not in the text: the same questions on another passage of their article\n"]
        parts += [_absence_table(summary["not_in_text"])]
    if summary["targets"]:
        parts += ["Targets\n", _target_table(summary["targets"])]
    return "\n".join([*parts, _published_table(summary["published"])])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _with_interval(figure: dict[str, Any] | None, form: str = "{:.3f}") -> str:
    if figure is None:
        return ""
    low, high = figure["interval"]
    return f"{form} [{form}, {form}]".format(figure["value"], low, high)


def _quality_table(runs: list[dict]) -> str:
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    cells: dict[str, dict[str, str]] = {}
    for run in runs:
        cells.setdefault(run["method"], {})[run["task"]] = _with_interval(run["quality"]["f1"])
    return _table(["method", *tasks], ([name, *(row.get(task, "") for task in tasks)] for name, row in cells.items()))


def _absence_table(entries: list[dict]) -> str:
    rows = []
    for entry in entries:
        aurocs = (_with_interval(figure) for figure in entry["auroc"].values())
        threshold = f"{entry['threshold']:.3f}{', chosen on these' * entry['threshold_chosen_here']}"
        shares = (_with_interval(entry[name]) for name in ("declined", "answerable_lost", "f1_with_declined"))
        rows.append([entry["method"], entry["task"], *aurocs, threshold, *shares])
    summaries = [f"AUROC, {name}" for name in entries[0]["auroc"]]
    header = ["method", "task", *summaries, "threshold", "declined", "answerable declined", "F1 of the answerable"]
    return _table(header, rows)


COST_COLUMNS = {
    "cache_bytes_per_token": ("bytes a token, stored", "{:.0f}"),
    "resident_bytes_per_token": ("resident", "{:.0f}"),
    "context_tokens": ("context tokens", "{:.0f}"),
    "prompt_tokens": ("prompt tokens", "{:.0f}"),
    "seconds_per_question": ("seconds a question", "{:.2f}"),
}


def _cost_table(runs: list[dict]) -> str:
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        costs = [run["cost"] for run in runs if run["method"] == method]
        row = [method]
        for key, (_, form) in COST_COLUMNS.items():
            values = [cost[key] for cost in costs if cost.get(key) is not None]
            row.append(form.format(np.mean(values)) if values else "")
        rows.append(row)
    return _table(["method", *(title for title, _ in COST_COLUMNS.values())], rows)


def _difference_table(entries: list[dict]) -> str:
    rows = []
    for entry in entries:
        difference = _with_interval({"value": entry["difference"], "interval": entry["interval"]}, "{:+.3f}")
        names = f"{entry['first']} - {entry['second']}"
        rows.append([entry["task"], names, difference, _with_interval(entry["ratio"]), str(entry["documents"])])
    return _table(["task", "methods", "difference of F1", "ratio", "questions"], rows)


def _target_table(entries: list[dict]) -> str:
    rows = [
        [entry["model"], entry["task"], entry["target"], f"{entry['value']:.3f}",
         f"{entry['relation']} {entry['required']:.3f}", "yes" if entry["met"] else "no"]
        for entry in entries
    ]  # fmt: skip
    return _table(["checkpoint", "task", "target", "value", "required", "met"], rows)


def _published_table(published: dict) -> str:
    header = ["method", *published["columns"], "bytes a token"]
    rows = [
        [name, *(f"{value:.1f}" for value in row["values"]), str(row["cache_bytes_per_token"])]
        for name, row in published["rows"].items()
    ]
    return f"## Published ({published['metric']})\n\n{published['source']}; {published['note']}.\n\n" + _table(
        header, rows
    )
