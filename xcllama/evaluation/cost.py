"""What an answer cost, carried by the answer itself: lm-eval hands a task nothing but the model's responses."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """The cost of one response.

    Args:
        context_tokens: tokens of the contexts that were read, in the cache or in the prompt.
        prompt_tokens: tokens that were prefilled for this response, contexts in the prompt included.
        cache_bytes: bytes of the cached states (or keys and values of a prompt prefix) that were read.
        cache_hit: whether they were there already, from an earlier response or run; None: nothing is cached.
        generated_tokens: tokens generated, the end token included; None: nothing is generated.
        time_to_first_token: seconds from the batch's ids to its first logits, encoding of contexts not counted; where
            choices are scored, to the logits that score them.
    """

    context_tokens: int
    prompt_tokens: int
    cache_bytes: int = 0
    cache_hit: bool | None = None
    generated_tokens: int | None = None
    time_to_first_token: float | None = None

    def metrics(self) -> dict[str, float]:
        """The known figures as metrics of a sample."""
        return {name: float(value) for name, value in asdict(self).items() if value is not None}


COST_METRICS = tuple(Cost.__dataclass_fields__)


class MeasuredText(str):
    """A generated answer with its `cost`."""

    cost: Cost


class MeasuredScore(tuple):
    """(log-likelihood, is greedy) with its `cost`."""

    cost: Cost


class MeasuredFloat(float):
    """A rolling log-likelihood with its `cost`."""

    cost: Cost


_KINDS = {str: MeasuredText, tuple: MeasuredScore, float: MeasuredFloat}


def measured(response: str | tuple | float, cost: Cost) -> Any:
    """`response`, equal to what it was, with a `cost`."""
    carrier = _KINDS[type(response)](response)
    carrier.cost = cost
    return carrier


def cost_metrics(response: Any) -> dict[str, float]:
    """The cost that a response carries; empty for responses of other models."""
    cost = getattr(response, "cost", None)
    return cost.metrics() if cost is not None else {}
