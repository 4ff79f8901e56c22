"""The picture of a comparison: F1 against the bytes that a context token takes, stored and resident."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from xcllama.durable import write_picture

# drawn as lines: they keep no context
CLOSED_BOOK = ("none", "LoRA / none")
# the ways to read one right passage; others ask another question of a method
SHOWN = ("cross", "prompt", "LoRA / prompt", *CLOSED_BOOK)
SIZES = {
    "cache_bytes_per_token": "bytes a context token, stored",
    "resident_bytes_per_token": "bytes a context token, resident while reading",
}


def draw(summary: dict[str, Any], path: Path) -> None:
    """Write the picture of a summary of `tables.summarize` to a PNG, a row a task; the prompt stands at the right.

    Raises:
        ValueError: no run reads one right passage.
    """
    runs = [run for run in summary["runs"] if run["mode"] in SHOWN]
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    if not tasks:
        raise ValueError("there is nothing to plot: no run reads one right passage.")
    methods = list(dict.fromkeys(run["method"] for run in runs))
    colors = dict(zip(methods, pyplot.get_cmap("tab20").colors * (1 + len(methods) // 20), strict=False))
    figure, panels = pyplot.subplots(
        len(tasks), len(SIZES), figsize=(10, 1 + 4 * len(tasks)), squeeze=False, sharey="row", layout="constrained"
    )
    drawn = {}
    for row, task in zip(panels, tasks, strict=True):
        for panel, (size, label) in zip(row, SIZES.items(), strict=True):
            for run in runs:
                if run["task"] == task:
                    drawn[run["method"]] = _draw_run(panel, run, size, colors[run["method"]])
            panel.set(title=task, ylabel="token F1", xscale="log", xlabel=label, ylim=(0, None))
            panel.grid(alpha=0.3)
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=3, fontsize=7)
    write_picture(path, figure)


def _draw_run(panel, run: dict[str, Any], size: str, color) -> Any:
    figure = run["quality"]["f1"]
    if run["mode"] in CLOSED_BOOK:
        return panel.axhline(figure["value"], color=color, linestyle="--", linewidth=1)
    low, high = figure["interval"]
    error = [[figure["value"] - low], [high - figure["value"]]]
    place = run["cost"][size]
    return panel.errorbar(place, figure["value"], yerr=error, color=color, marker="o", markersize=4, capsize=2)
