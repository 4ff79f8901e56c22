"""Rows of token ids through a causal model in batches: scores and generation, with caches and prefixes."""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from xcllama.evaluation.contexts import Texts


@dataclass(frozen=True)
class Row:
    """One request as token ids.

    Args:
        prompt: ids that are given, contexts in the prompt included.
        continuation: ids to score (empty when generating).
        texts: contexts that are read through cross-attention.
        prefix: ids in front of the question whose keys and values are computed ahead (prompt_kv).
        context_tokens: how many of `prompt` are of contexts.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...] = ()
    texts: Texts = ()
    prefix: tuple[int, ...] = ()
    context_tokens: int = 0

    @property
    def inputs(self) -> tuple[int, ...]:
        """What a model reads to predict the continuation."""
        return (self.prompt + self.continuation)[:-1]


class FirstLogits(LogitsProcessor):
    """Notes the time of a generation's first logits and changes nothing."""

    def __init__(self, device: torch.device):
        self.device, self.time = device, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.time is None:
            synchronize(self.device)
            self.time = time.perf_counter()
        return scores


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator, so that times are those of finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[int]]:
    """Indices of `rows` in batches of one prefix and falling length."""
    order = sorted(range(len(rows)), key=lambda index: (rows[index].prefix, -len(rows[index].inputs)))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == batch_size or rows[index].prefix != rows[batch[0]].prefix):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(
    sequences: Sequence[Sequence[int]], pad_token_id: int, side: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and mask `[rows, longest]`, padded on `side`."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(longest - len(sequence), None) if side == "left" else slice(0, len(sequence))
        ids[row, where] = torch.tensor(sequence)
        mask[row, where] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def prefix_cache(model: PreTrainedModel, prefix: Sequence[int]) -> DynamicCache:
    """Keys and values of `prefix`, for one row."""
    ids = torch.tensor([list(prefix)], device=model.device)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def shared_prefix(rows: Sequence[Row], limits: Sequence[int]) -> int:
    """How many ids of their prefix all `rows` begin with; of row i at most `limits[i]`."""
    shared = min(len(rows[0].prefix), *limits)
    for row in rows:
        same = 0
        while same < shared and row.prompt[same] == row.prefix[same]:
            same += 1
        shared = same
    return shared


def expanded(cache: DynamicCache, length: int, rows: int) -> DynamicCache:
    """A copy of the first `length` positions for `rows` rows."""
    cache = copy.deepcopy(cache)
    if (surplus := cache.get_seq_length() - length) > 0:
        cache.crop(-surplus)
    cache.batch_repeat_interleave(rows)
    return cache


@torch.no_grad()
def score(
    model: PreTrainedModel,
    rows: Sequence[Row],
    targets: Sequence[Sequence[tuple[int, ...]]],
    pad_token_id: int,
    context=None,
    prefix: DynamicCache | None = None,
) -> list[tuple[float, bool]]:
    """(sum of log-probabilities, whether greedy decoding would give it) of every target of every row, in order.

    Args:
        rows: one batch; with `prefix` they share it.
        targets: continuations of each row, of equal length, that differ in their last token only.
        context: a context cache with a row for each, or None.
        prefix: keys and values of the rows' prefix, or None.
    """
    shared, options = 0, {}
    if context is not None:
        options["context_cache"] = context
    if prefix is not None:
        # the logits of the first scored token must come from this call
        shared = shared_prefix(rows, [len(row.inputs) - len(row.continuation) for row in rows])
        options["past_key_values"] = expanded(prefix, shared, len(rows))
    inputs = [row.inputs[shared:] for row in rows]
    # right-padded and causal: no token that counts sees the padding, so no mask is needed
    ids, _ = pad(inputs, pad_token_id, "right", model.device)
    width = ids.shape[1]
    keep = max(width - len(own) + len(row.continuation) for own, row in zip(inputs, rows, strict=True))
    logits = model(input_ids=ids, use_cache=prefix is not None, logits_to_keep=keep, **options).logits
    scores = []
    for own, row, row_targets, row_logits in zip(inputs, rows, targets, logits, strict=True):
        end = logits.shape[1] - (width - len(own))
        log_probabilities = row_logits[end - len(row.continuation) : end].float().log_softmax(-1)
        greedy = log_probabilities.argmax(-1)
        for target in torch.tensor(row_targets, device=logits.device):
            value = log_probabilities.gather(1, target[:, None]).sum().item()
            scores.append((value, bool((greedy == target).all())))
    return scores


def generation_inputs(
    model: PreTrainedModel, rows: Sequence[Row], pad_token_id: int, prefix: DynamicCache | None
) -> dict[str, Tensor | DynamicCache]:
    """Ids, mask and, with `prefix`, the keys and values of what the rows share, for `generate`."""
    if prefix is None:
        ids, mask = pad([row.prompt for row in rows], pad_token_id, "left", model.device)
        return {"context": ids, "attention_mask": mask}
    shared = shared_prefix(rows, [len(row.prompt) - 1 for row in rows])
    ids, mask = pad([row.prompt[shared:] for row in rows], pad_token_id, "left", model.device)
    # padding stands between the prefix and the question
    head = torch.tensor([rows[0].prompt[:shared]] * len(rows), device=model.device, dtype=ids.dtype)
    return {
        "context": torch.cat([head, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(head), mask], dim=1),
        "past_key_values": expanded(prefix, shared, len(rows)),
    }
