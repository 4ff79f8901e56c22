"""Attention weights over context tokens as spans of characters: which part of a text an answer came from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """A span of a document and the share of the attention that it got.

    Args:
        document: position of the document in the row.
        start, end: characters of its text.
        weight: sum of the weights of its tokens.
        text: the span, where the texts were given.
    """

    document: int
    start: int
    end: int
    weight: float
    text: str | None = None


def find_evidence(
    weights: Tensor,
    offset_mappings: Sequence[Sequence[tuple[int, int]] | Tensor],
    texts: Sequence[str] | None = None,
    *,
    num_spans: int = 3,
    span_tokens: int = 16,
) -> list[Evidence]:
    """The spans of the documents that one row attended to most, best first; no two overlap.

    Args:
        weights: one row of `context_weights`, `[at least num_tokens]`.
        offset_mappings: characters of each token of each document the row reads, in order and without padding: what
            `processor(..., return_offsets_mapping=True)` gives as `context_offset_mapping`.
        texts: the documents, to cut the spans out of.
        num_spans: most spans to return.
        span_tokens: tokens of a span, fewer in shorter documents.

    Raises:
        ValueError: more tokens than weights, or counts below 1.
    """
    mappings = [torch.as_tensor(mapping).reshape(-1, 2) for mapping in offset_mappings]
    lengths = [len(mapping) for mapping in mappings]
    if sum(lengths) > weights.shape[0]:
        raise ValueError(
            f"the documents have {sum(lengths)} tokens, `weights` {weights.shape[0]}; pass one row's own."
        )
    if num_spans < 1 or span_tokens < 1:
        raise ValueError(f"`num_spans` and `span_tokens` must be positive, got {num_spans} and {span_tokens}.")
    found = []
    parts = weights[: sum(lengths)].float().cpu().split(lengths)
    for document, (mapping, part) in enumerate(zip(mappings, parts, strict=True)):
        # special tokens stand for no characters
        part = part.masked_fill(mapping[:, 0] == mapping[:, 1], 0.0)
        for first, last, weight in _windows(part, min(span_tokens, len(part)), num_spans):
            shown = mapping[first:last][mapping[first:last, 0] < mapping[first:last, 1]]
            if weight > 0:
                start, end = int(shown[:, 0].min()), int(shown[:, 1].max())
                text = None if texts is None else texts[document][start:end]
                found.append(Evidence(document, start, end, weight, text))
    return sorted(found, key=lambda evidence: -evidence.weight)[:num_spans]


def _windows(weights: Tensor, width: int, count: int) -> list[tuple[int, int, float]]:
    """Up to `count` windows of `width` tokens with the most weight, none overlapping."""
    windows = []
    if width == 0:
        return windows
    totals = weights.unfold(0, width, 1).sum(-1)
    for _ in range(count):
        first = int(totals.argmax())
        if not totals[first].isfinite():
            break
        windows.append((first, first + width, float(totals[first])))
        totals[max(0, first - width + 1) : first + width] = -torch.inf
    return windows
