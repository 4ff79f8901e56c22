"""From lm-eval's JSON to tables: quality with bootstrap intervals, cost, differences, and what was published.

runs = load_runs([Path("runs/eval")])
print(markdown(summarize(runs)))
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xcllama.evaluation.cost import COST_METRICS
from xcllama.evaluation.targets import targets

QUALITY = ("f1", "acc", "exact_match", "answer_recall", "rouge_l", "bert_score", "meteor", "k_precision",
           "no_answer_accuracy", "bits_per_byte", "word_perplexity")  # fmt: skip
RESAMPLES = 10_000
PUBLISHED = Path(__file__).parent / "published.json"
# what else a run tells of its contexts
COUNTS = ("contexts", "contexts_encoded", "contexts_from_folder", "cache_bytes_per_token")
# first minus second, where both were run on the same documents
DIFFERENCES = (("cross", "none"), ("cross", "prompt"), ("cross", "LoRA / prompt"), ("prompt", "none"),
               ("LoRA / prompt", "LoRA / none"))  # fmt: skip
QUANTIZED = ("int8", "int4")


@dataclass(frozen=True)
class Run:
    """One task evaluated one way.

    Args:
        model: name of the model's last folder; of its base, where nothing that was added takes part.
        base: name of the frozen decoder.
        mode: its context mode; "LoRA / ..." with an adapter.
        cache_dtype: of the encoded contexts; None where nothing is encoded.
        metrics: metric -> (value, standard error or None).
        samples: metric -> {document: value}; empty without a samples file.
        config: lm-eval's configuration and the model's own figures.
        origin: command, commit and date of the run.
    """

    task: str
    model: str
    base: str
    mode: str
    cache_dtype: str | None
    metrics: dict[str, tuple[float, float | None]]
    samples: dict[str, dict[int, float]]
    config: dict[str, Any]
    origin: dict[str, Any]

    @property
    def method(self) -> str:
        """What a table's row is called."""
        return " / ".join(part for part in (self.model, self.mode, self.cache_dtype) if part)


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
    mode, base = config.get("context_mode", "prompt"), Path(config.get("base_model") or name).name
    if config.get("adapter"):
        mode = f"LoRA / {mode}"
    elif mode in ("prompt", "prompt_kv", "none"):
        name = base
    origin = config["provenance"] | {"batch_size": config.get("batch_size")}
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
        runs.append(Run(task, name, base, mode, config.get("cache_dtype"), metrics, samples, config, origin))
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
    """Figures of all runs, paired differences, what the project aims at, and the published figures apart."""
    entries = []
    for run in sorted(runs, key=lambda run: (run.task, run.method)):
        cost = {metric: run.metrics[metric][0] for metric in COST_METRICS if metric in run.metrics}
        entries.append(
            {
                "task": run.task,
                "method": run.method,
                "model": run.model,
                "mode": run.mode,
                "cache_dtype": run.cache_dtype,
                "added_digest": run.config.get("added_digest"),
                "limit": run.config.get("limit"),
                "quality": {metric: _figure(run, metric) for metric in QUALITY if metric in run.metrics},
                "cost": cost | {name: run.config.get(name) for name in COUNTS},
                "origin": run.origin,
            }
        )
    published = json.loads(PUBLISHED.read_text())
    return {"runs": entries, "differences": differences(runs), "targets": targets(entries), "published": published}


def _figure(run: Run, metric: str) -> dict[str, Any]:
    count = len(run.samples.get(metric, ())) or None
    source = "bootstrap" if metric in run.samples else "standard error"
    return {"value": run.metrics[metric][0], "interval": interval(run, metric), "from": source, "documents": count}


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Paired differences of F1 or accuracy between methods on one base, over the documents that both answered."""
    found = []
    for first in runs:
        for second in runs:
            if (first.task, first.base) != (second.task, second.base) or not _compared(first, second):
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


def _compared(first: Run, second: Run) -> bool:
    """Whether `first` minus `second` says something."""
    exact = first.cache_dtype not in QUANTIZED
    if first.model == second.model and first.mode == "cross":
        if second.mode == "cross_shuffled":
            return first.cache_dtype == second.cache_dtype
        if second.mode == "cross":
            return not exact and second.cache_dtype not in QUANTIZED
    if first.mode == second.mode == "cross":
        return first.model > second.model and exact and first.cache_dtype == second.cache_dtype
    return exact and (first.mode, second.mode) in DIFFERENCES


def markdown(summary: dict[str, Any]) -> str:
    """The tables of a summary."""
    runs = summary["runs"]
    parts = ["## Measured here\n"]
    for title, metrics in (("F1, or accuracy of yes and no", ("f1", "acc")), ("BERTScore", ("bert_score",))):
        if any(metric in run["quality"] for run in runs for metric in metrics):
            parts += [f"{title} (95 % bootstrap interval over documents)\n", _quality_table(runs, metrics)]
    parts += ["Cost, means over the documents of all tasks; seconds are those of a whole batch\n", _cost_table(runs)]
    if summary["differences"]:
        parts += ["Paired differences on the same documents\n", _difference_table(summary["differences"])]
    if summary["targets"]:
        parts += ["Targets\n", _target_table(summary["targets"])]
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
    "contexts_encoded": ("contexts encoded", "{:.0f}"),
    "contexts_from_folder": ("from the folder", "{:.0f}"),
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


def _target_table(entries: list[dict]) -> str:
    rows = [
        [entry["model"], entry["task"].removeprefix("xc_"), entry["target"], f"{entry['value']:.3f}",
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
