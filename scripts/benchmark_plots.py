"""Plots of results/benchmark.json: ratios to the targets, latency and memory against context length."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from benchmark_ratios import ratios
from matplotlib import pyplot

from xcllama.durable import write_picture

SHOWN = (
    "hidden 16-bit, file warm",
    "hidden int8, file warm",
    "condensed 16-bit, file warm",
    "KV prefix, file warm",
    "text in the prompt",
)


def draw(results: dict, folder: Path) -> None:
    """benchmark_latency.png, benchmark_memory.png and benchmark_ratios.png in `folder`."""
    parts = {name: part for name, part in results.items() if name.startswith("context_") and "requests" in part}
    contexts = dict(sorted((int(name.split("_")[1]), part) for name, part in parts.items()))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, field, title in zip(
        axes, ("first_token_seconds", "step_seconds"), ("first token", "a token after it"), strict=True
    ):
        for name in (*SHOWN, "hidden 16-bit, compiled", "text in the prompt, compiled"):
            points = [
                (length, 1000 * part["requests"][name][field]["median"])
                for length, part in contexts.items()
                if field in part["requests"].get(name, {})
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="ms", title=title)
        axis.set_xticks(list(contexts), [f"{length:,}" for length in contexts], minor=False)
        axis.minorticks_off()
    axes[1].legend(fontsize=8)
    write_picture(folder / "benchmark_latency.png", figure)
    figure, axis = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    for field, style in (("file_bytes", "o-"), ("resident_bytes", "s--")):
        for name in SHOWN:
            points = [
                (length, part["requests"][name][field] / 2**20)
                for length, part in contexts.items()
                if field in part["requests"].get(name, {})
            ]
            if points:
                label = f"{name.split(',')[0]}: {field.split('_')[0]}"
                axis.plot(*zip(*points, strict=True), style, label=label)
    axis.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="MiB", title="on disk and in memory")
    axis.set_xticks(list(contexts), [f"{length:,}" for length in contexts], minor=False)
    axis.minorticks_off()
    axis.legend(fontsize=7)
    write_picture(folder / "benchmark_memory.png", figure)
    draw_ratios(results, folder)


def draw_ratios(results: dict, folder: Path) -> None:
    """Each ratio that has a target, with the target."""
    aimed = {name: row for name, row in ratios(results).items() if row["target"] is not None}
    if not aimed:
        return
    figure, axis = pyplot.subplots(figsize=(9, 0.4 * len(aimed) + 1), layout="constrained")
    axis.barh(list(aimed), [row["value"] for row in aimed.values()], color="tab:blue")
    for position, row in enumerate(aimed.values()):
        axis.plot([row["target"]] * 2, [position - 0.4, position + 0.4], color="tab:red")
    axis.set(xscale="log", title="ratios, and their targets in red")
    axis.invert_yaxis()
    write_picture(folder / "benchmark_ratios.png", figure)
