"""How well the score of an answer tells passages that answer a question from passages of the same article that do not.

A record's answer is given or declined by `answer_score`; the other summaries of its tokens' probabilities stand beside
it, so that the choice among them, made on dev, can be looked at.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_xcllama.answer_scores import answer_score
from xcllama.durable import write_json
from xcllama.evaluation import bootstrap

# share of the answerable questions that may be declined where a threshold is chosen
MOST_LOST = 0.10

Record = dict[str, Any]

CANDIDATES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": np.mean,
    "minimum": np.min,
    "first": lambda scores: scores[0],
}


def record_score(record: Record) -> float:
    """The score of a record's answer, as whatever declines answers computes it."""
    return answer_score(torch.tensor(record["token_scores"]))


def threshold_of(scores: Sequence[float], most_lost: float = MOST_LOST) -> float:
    """The highest score below which at most this share of answerable questions lies."""
    return sorted(scores)[int(most_lost * len(scores))]


def stored_threshold(folder: str) -> float | None:
    """The `answer_threshold` of a checkpoint's config; None: it has none."""
    config = Path(folder) / "config.json"
    return json.loads(config.read_text()).get("answer_threshold") if config.is_file() else None


def store_threshold(folder: str, right: Sequence[Record]) -> float:
    """Let a checkpoint decline answers below the threshold that these records choose; written into its config."""
    threshold = round(threshold_of([record_score(record) for record in right]), 4)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) | {"answer_threshold": threshold}
    write_json(path, dict(sorted(config.items())))
    return threshold


def not_in_text(right: Sequence[Record], absent: Sequence[Record], threshold: float | None) -> dict[str, Any]:
    """AUROC of each summary, and what a threshold declines.

    Args:
        right: records of questions on the passages that answer them.
        absent: on passages that do not; the questions that both hold are compared.
        threshold: below which answers are declined, chosen on other questions; None: chosen on these.
    """
    answered, others = {record["id"]: record for record in right}, {record["id"]: record for record in absent}
    ids = sorted(answered.keys() & others.keys())
    found = {}
    for name, summary in CANDIDATES.items():
        pair = ([summary(records[i]["token_scores"]) for i in ids] for records in (answered, others))
        found[name] = bootstrap.auroc(*pair).as_dict()
    scores = [record_score(record) for record in right]
    chosen_here = threshold is None
    threshold = threshold_of(scores) if chosen_here else threshold
    given = [score >= threshold for score in scores]
    kept = [record["f1"] * give for record, give in zip(right, given, strict=True)]
    return {
        "auroc": found,
        "threshold": threshold,
        "threshold_chosen_here": chosen_here,
        "declined": bootstrap.mean([record_score(others[i]) < threshold for i in ids]).as_dict(),
        "answerable_lost": bootstrap.mean([not give for give in given]).as_dict(),
        "f1_with_declined": bootstrap.mean(kept).as_dict(),
    }
