"""Paired bootstrap over questions: intervals of means, differences, ratios and areas under the ROC curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A figure with the bounds of its 95 % bootstrap interval, over so many questions."""

    value: float
    low: float
    high: float
    questions: int

    def as_dict(self) -> dict[str, object]:
        """As results files hold it."""
        return {"value": self.value, "interval": [self.low, self.high], "documents": self.questions}


def mean(values: Sequence[float]) -> Estimate:
    """The mean over questions."""
    (means,) = _resampled_means(values)
    return _estimate(np.mean(values), means, len(values))


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of `first` less mean of `second`; entry i of both is of question i."""
    firsts, seconds = _resampled_means(first, second)
    return _estimate(np.mean(first) - np.mean(second), firsts - seconds, len(first))


def ratio(first: Sequence[float], second: Sequence[float]) -> Estimate | None:
    """Mean of `first` over mean of `second`; entry i of both is of question i.

    None: the mean of `second` is 0, of all questions or of a resample.
    """
    firsts, seconds = _resampled_means(first, second)
    if not seconds.all():
        return None
    return _estimate(np.mean(first) / np.mean(second), firsts / seconds, len(first))


def auroc(right: Sequence[float], wrong: Sequence[float]) -> Estimate:
    """How often a score of `right` is above one of `wrong` (ties count half); entry i of both is of question i."""
    above = np.subtract.outer(np.asarray(right), np.asarray(wrong))
    wins = (above > 0) + 0.5 * (above == 0)
    weights = _weights(len(wins))
    return _estimate(wins.mean(), ((weights @ wins) * weights).sum(1), len(wins))


@cache
def _weights(count: int) -> np.ndarray:
    """The share of each question in every resample, `[RESAMPLES, count]`; the same for the same count."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def _resampled_means(*columns: Sequence[float]) -> np.ndarray:
    """Means of each column in the same resamples, `[columns, RESAMPLES]`."""
    values = np.array(columns, dtype=float)
    return values @ _weights(values.shape[1]).T


def _estimate(value: float, resampled: np.ndarray, count: int) -> Estimate:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high), count)
