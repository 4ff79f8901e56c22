"""The plot of a comparison: quality against the bytes that a context token takes, a panel a task."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

# drawn as lines: they keep no context
CLOSED_BOOK = ("none", "LoRA / none")
LABELS = {"f1": "token F1", "acc": "accuracy"}


def draw(summary: dict[str, Any], path: Path) -> None:
    """Write the plot of a summary of `tables.summarize` to a PNG.

    Raises:
        ValueError: no run has F1 or accuracy.
    """
    scored = [(run, metric) for run in summary["runs"] for metric in LABELS if metric in run["quality"]]
    tasks = list(dict.fromkeys(run["task"] for run, _ in scored))
    if not tasks:
        raise ValueError("there is nothing to plot: no run has F1 or accuracy.")
    methods = list(dict.fromkeys(run["method"] for run, _ in scored))
    colors = dict(zip(methods, pyplot.get_cmap("tab20").colors * (1 + len(methods) // 20), strict=False))
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(2 + 3 * len(tasks), 5), squeeze=False, layout="constrained"
    )
    drawn = {}
    for panel, task in zip(panels[0], tasks, strict=True):
        for run, metric in scored:
            if run["task"] == task:
                drawn[run["method"]] = _draw_run(panel, run, metric, colors[run["method"]])
                panel.set(title=task.removeprefix("xc_"), ylabel=LABELS[metric])
        panel.set(xscale="log", xlabel="bytes a context token", ylim=(0, None))
        panel.grid(alpha=0.3)
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=3, fontsize=7)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)
    partial.replace(path)


def _draw_run(panel, run: dict[str, Any], metric: str, color) -> Any:
    figure = run["quality"][metric]
    if run["mode"] in CLOSED_BOOK:
        return panel.axhline(figure["value"], color=color, linestyle="--", linewidth=1)
    low, high = figure["interval"] or (figure["value"], figure["value"])
    error = [[figure["value"] - low], [high - figure["value"]]]
    size = run["cost"]["cache_bytes_per_token"]
    return panel.errorbar(size, figure["value"], yerr=error, color=color, marker="o", markersize=4, capsize=2)
