"""From lm-eval's JSON to tables: quality with bootstrap intervals, cost, differences, and what was published.

runs = load_runs([Path("runs/eval")])
print(markdown(summarize(runs)))
"""

import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_tasks.cost import COST_METRICS

QUALITY = ("f1", "acc", "exact_match", "answer_recall", "rouge_l", "bert_score", "meteor", "k_precision",
           "no_answer_accuracy", "bits_per_byte", "word_perplexity")  # fmt: skip
RESAMPLES = 10_000
PUBLISHED = Path(__file__).parent / "published.json"
# first minus second, where both were run on the same documents
DIFFERENCES = (("cross", "cross_shuffled"), ("cross", "none"), ("cross", "prompt"), ("prompt", "none"))


@dataclass(frozen=True)
class Run:
    """One task evaluated one way.

    Args:
        model: name of the model's last folder.
        mode: its context mode.
        cache_dtype: of the encoded contexts; None where nothing is encoded.
        metrics: metric -> (value, standard error or None).
        samples: metric -> {document: value}; empty without a samples file.
        config: lm-eval's configuration and the model's own figures.
        origin: command, commit and date of the run.
    """

    task: str
    model: str
    mode: str
    cache_dtype: str | None
    metrics: dict[str, tuple[float, float | None]]
    samples: dict[str, dict[int, float]]
    config: dict[str, Any]
    origin: dict[str, Any]

    @property
    def method(self) -> str:
        """What a table's row is called."""
        parts = [self.model, "LoRA" if self.config.get("adapter") else None, self.mode, self.cache_dtype]
        return " / ".join(part for part in parts if part)


def load_runs(folders: Iterable[Path]) -> list[Run]:
    """All runs under some folders; of several of one method and task, the newest.

    Raises:
        ValueError: a folder without results.
    """
    found: dict[tuple[str, str], Run] = {}
    for folder in folders:
        paths = sorted(folder.rglob("results_*.json"), key=lambda path: json.loads(path.read_text())["date"])
        if not paths:
            raise ValueError(f"no results_*.json under {folder}; give the --output_path of an evaluation.")
        for path in paths:
            for run in _runs_of(path):
                found[run.method, run.task] = run
    return list(found.values())


def _runs_of(path: Path) -> list[Run]:
    document = json.loads(path.read_text())
    config = document["config"]
    arguments = config["model_args"]
    folder = Path(arguments.get("peft") or arguments.get("pretrained", config["model"]))
    # RUN/export is what training wrote of a run
    name = folder.parent.name if folder.name == "export" else folder.name
    versions = {key: value for key, value in document.items() if key.endswith("_version")}
    origin = {
        "command": config.get("command"),
        "commit": document.get("git_hash"),
        "date": datetime.datetime.fromtimestamp(document["date"], datetime.UTC).isoformat(timespec="seconds"),
        "seed": config.get("torch_seed"),
        "versions": versions,
    }
    runs = []
    for task, figures in document["results"].items():
        metrics = {}
        for key, value in figures.items():
            metric, _, suffix = key.partition(",")
            if suffix and not metric.endswith("_stderr") and metric in (*QUALITY, *COST_METRICS):
                error = figures.get(f"{metric}_stderr,{suffix}")
                metrics[metric] = (value, error if isinstance(error, int | float) else None)
        file = document.get("samples_files", {}).get(task)
        samples = {} if file is None else _samples(path.parent / file, tuple(metrics))
        mode = config.get("context_mode", "prompt")
        runs.append(Run(task, name, mode, config.get("cache_dtype"), metrics, samples, config, origin))
    return runs


def _samples(path: Path, metrics: tuple[str, ...]) -> dict[str, dict[int, float]]:
    """Per-document values of a samples file."""
    values: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        sample = json.loads(line)
        for metric in metrics:
            if isinstance(sample.get(metric), int | float):
                values.setdefault(metric, {})[sample["doc_id"]] = float(sample[metric])
    return values


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over documents."""
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [array[generator.integers(0, len(array), len(array))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def interval(run: Run, metric: str) -> tuple[float, float] | None:
    """The bootstrap interval of a metric; from its standard error where no samples were logged."""
    if metric in run.samples:
        return bootstrap_interval(list(run.samples[metric].values()))
    value, error = run.metrics[metric]
    return None if error is None else (value - 1.96 * error, value + 1.96 * error)


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Figures of all runs, paired differences, and the published ones apart."""
    entries = []
    for run in sorted(runs, key=lambda run: (run.task, run.method)):
        quality = {metric: _figure(run, metric) for metric in QUALITY if metric in run.metrics}
        cost = {metric: run.metrics[metric][0] for metric in COST_METRICS if metric in run.metrics}
        cost["cache_bytes_per_token"] = run.config.get("cache_bytes_per_token")
        limit = run.config.get("limit")
        entries.append(
            {"task": run.task, "method": run.method, "mode": run.mode, "limit": limit, "quality": quality,
             "cost": cost, "origin": run.origin}
        )  # fmt: skip
    return {"runs": entries, "differences": differences(runs), "published": json.loads(PUBLISHED.read_text())}


def _figure(run: Run, metric: str) -> dict[str, Any]:
    count = len(run.samples.get(metric, ())) or None
    source = "bootstrap" if metric in run.samples else "standard error"
    return {"value": run.metrics[metric][0], "interval": interval(run, metric), "from": source, "documents": count}


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Paired differences of F1 or accuracy between modes of one model, over the documents that both answered."""
    found = []
    for first in runs:
        for second in runs:
            same = (first.task, first.model) == (second.task, second.model)
            pair = (first.mode, second.mode)
            dtypes = {run.cache_dtype for run in (first, second)} - {None}
            if not same or pair not in DIFFERENCES or len(dtypes) > 1:
                continue
            metric = next((name for name in QUALITY if name in first.samples and name in second.samples), None)
            if metric is None:
                continue
            both = sorted(set(first.samples[metric]) & set(second.samples[metric]))
            values = [first.samples[metric][doc] - second.samples[metric][doc] for doc in both]
            if values:
                entry = {"task": first.task, "first": first.method, "second": second.method, "metric": metric}
                entry |= {"difference": float(np.mean(values)), "interval": bootstrap_interval(values)}
                found.append(entry | {"documents": len(both)})
    return found


def markdown(summary: dict[str, Any]) -> str:
    """The tables of a summary."""
    runs = summary["runs"]
    parts = ["## Measured here\n"]
    for title, metrics in (("F1, or accuracy of yes and no", ("f1", "acc")), ("BERTScore", ("bert_score",))):
        if any(metric in run["quality"] for run in runs for metric in metrics):
            parts += [f"{title} (95 % bootstrap interval over documents)\n", _quality_table(runs, metrics)]
    parts += ["Cost, means over the documents of all tasks\n", _cost_table(runs)]
    if summary["differences"]:
        parts += ["Paired differences on the same documents\n", _difference_table(summary["differences"])]
    return "\n".join([*parts, _published_table(summary["published"])])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _quality_table(runs: list[dict], metrics: tuple[str, ...]) -> str:
    tasks = [task for task in dict.fromkeys(run["task"] for run in runs)]
    cells: dict[str, dict[str, str]] = {}
    for run in runs:
        figure = next((run["quality"][metric] for metric in metrics if metric in run["quality"]), None)
        if figure is not None:
            text = f"{figure['value']:.3f}"
            if figure["interval"]:
                text += f" [{figure['interval'][0]:.3f}, {figure['interval'][1]:.3f}]"
            cells.setdefault(run["method"], {})[run["task"]] = text
    tasks = [task for task in tasks if any(task in row for row in cells.values())]
    names = [task.removeprefix("xc_") for task in tasks]
    return _table(
        ["method", *names], ([method, *(row.get(task, "") for task in tasks)] for method, row in cells.items())
    )


COST_COLUMNS = {
    "cache_bytes_per_token": ("bytes a token", "{:.0f}"),
    "context_tokens": ("context tokens", "{:.0f}"),
    "prompt_tokens": ("prompt tokens", "{:.0f}"),
    "cache_bytes": ("cache bytes", "{:.0f}"),
    "cache_hit": ("hits", "{:.2f}"),
    "time_to_first_token": ("s to first token", "{:.3f}"),
    "generated_tokens": ("generated tokens", "{:.1f}"),
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
    rows = [
        [entry["task"].removeprefix("xc_"), f"{entry['first']} - {entry['second']}", entry["metric"],
         f"{entry['difference']:+.3f} [{entry['interval'][0]:+.3f}, {entry['interval'][1]:+.3f}]",
         str(entry["documents"])]
        for entry in entries
    ]  # fmt: skip
    return _table(["task", "difference", "metric", "value", "documents"], rows)


def _published_table(published: dict) -> str:
    header = ["method", *published["columns"], "bytes a token"]
    rows = [
        [name, *(f"{value:.1f}" for value in row["values"]), str(row["cache_bytes_per_token"])]
        for name, row in published["rows"].items()
    ]
    return f"## Published ({published['metric']})\n\n{published['source']}; {published['note']}.\n\n" + _table(
        header, rows
    )
