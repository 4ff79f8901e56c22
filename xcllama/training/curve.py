"""The training curve of a run as JSON and PNG, from its log."""

from pathlib import Path
from typing import Any

from xcllama.durable import write_json, write_picture
from xcllama.training.loop import read_log


def write_curve(logs: list[Path], folder: Path, title: str) -> dict[str, Any]:
    """Write curve.json and curve.png of the stages of a run to `folder` and return what curve.json holds.

    Args:
        logs: of the stages, first to last; steps are counted through.

    Raises:
        ValueError: the logs hold no loss.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines: list[dict[str, float]] = []
    for log in logs:
        before = lines[-1]["step"] if lines else 0
        lines += [line | {"step": line["step"] + before} for line in read_log(log)]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if not losses:
        raise ValueError(f"{logs[-1]} holds no loss; a curve needs at least one logged step.")
    curve: dict[str, Any] = {"loss": losses}
    for name in ("right_context", "wrong_context"):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            curve[name] = points
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(*zip(*losses, strict=True), label="training", color="0.6", linewidth=1)
    for name, label in (("right_context", "held out, right context"), ("wrong_context", "held out, wrong context")):
        if name in curve:
            axes.plot(*zip(*curve[name], strict=True), label=label, marker="o", markersize=3)
    axes.set(xlabel="step", ylabel="loss of an answer token (nats)", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    write_picture(folder / "curve.png", figure)
    write_json(folder / "curve.json", curve)
    return curve
