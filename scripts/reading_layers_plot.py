"""The picture of `reading_layers.py`: what of the prompt's gain a cache keeps, against what it costs."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from xcllama.durable import write_picture

AXES = {
    "stored_bytes_per_token": "bytes a context token, stored",
    "resident_bytes_per_token": "bytes a context token, resident while reading",
    "step_seconds": "ms a token at {context_tokens:,} context tokens",
}


def kept(figures: dict[str, Any], loss: float) -> float:
    """Share of what the prompt brings over no text at all."""
    return (figures["loss_without"] - loss) / (figures["loss_without"] - figures["loss_prompt"])


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write the PNG: a line for each choice of states, numbers of reading layers at its points; and the prompt."""
    prompt = {"stored_bytes_per_token": figures["prompt_bytes_per_token"]}
    prompt |= {"resident_bytes_per_token": figures["prompt_bytes_per_token"]}
    prompt |= {"step_seconds": figures["prompt_step_seconds"]}
    lines: dict[str, list[dict]] = {}
    for row in figures["rows"]:
        lines.setdefault("states of layer " + " and ".join(map(str, row["states"])), []).append(row)
    figure, panels = pyplot.subplots(1, len(AXES), figsize=(13, 4.2), sharey=True, layout="constrained")
    for panel, (field, label) in zip(panels, AXES.items(), strict=True):
        scale = 1000 if field == "step_seconds" else 1
        for name, rows in lines.items():
            places = [row[field] * scale for row in rows]
            shares = [kept(figures, row["loss"]) for row in rows]
            panel.plot(places, shares, marker="o", markersize=4, label=name)
            for place, share, row in zip(places, shares, rows, strict=True):
                panel.annotate(
                    len(row["layers"]), (place, share), fontsize=6, textcoords="offset points", xytext=(3, 3)
                )
        panel.plot(prompt[field] * scale, 1.0, marker="*", markersize=12, linestyle="", color="black", label="prompt")
        panel.set(xlabel=label.format(**figures), ylim=(0, 1.05))
        panel.grid(alpha=0.3)
        if field != "step_seconds":
            panel.set_xscale("log")
    panels[0].set_ylabel("share of the prompt's gain, without training")
    panels[0].legend(fontsize=8, loc="lower right")
    write_picture(path, figure)
