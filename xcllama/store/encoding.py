"""Texts to packed states and back to caches: what the store and the bulk encoder share."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy
import torch
from torch import Tensor

from modeling_xcllama.context_cache import LAYOUTS, ContextCache, QuantizedTensor

DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
SUFFIXES = ("", ".scale", ".zero")
# tokens encoded in one call: on a CPU a second's work, so that progress shows and little is lost
TOKENS_PER_CALL = {"cpu": 512}
TOKENS_PER_CALL_ELSEWHERE = 16384


def state_parts(cache: ContextCache) -> dict[str, Tensor]:
    """The tensors of a cache that have one row a token, by their names in a file."""
    parts = {"token_ids": cache.token_ids}
    for name, state in cache.states.items():
        tensors = (state,) if isinstance(state, Tensor) else state.tensors()
        parts |= {name + suffix: tensor for suffix, tensor in zip(SUFFIXES, tensors, strict=False)}
    return parts


def cache_of_parts(
    parts: Mapping[str, Tensor], offsets: tuple[int, ...], fingerprint: str, rows: tuple | None = None
) -> ContextCache:
    """The inverse of `state_parts`."""
    states = {}
    for name in LAYOUTS["hidden" if "hidden" in parts else "condensed"]:
        stored = [parts[name + suffix] for suffix in SUFFIXES if name + suffix in parts]
        states[name] = stored[0] if len(stored) == 1 else QuantizedTensor(*stored)
    return ContextCache(states, offsets, parts["token_ids"], fingerprint, rows)


def contexts_of(cache: ContextCache) -> Iterator[dict[str, Tensor]]:
    """The tensors of each context of a cache."""
    parts = state_parts(cache)
    for start, end in pairwise(cache.offsets):
        yield {name: part[start:end] for name, part in parts.items()}


def offsets_of(lengths: Iterable[int]) -> tuple[int, ...]:
    """Cumulated lengths, from 0."""
    return tuple(accumulate(lengths, initial=0))


def content_digest(token_ids: Sequence[int] | Tensor) -> bytes:
    """Names a context by what is encoded: 128 bits over its token ids."""
    return hashlib.blake2b(numpy.asarray(token_ids, numpy.int32).tobytes(), digest_size=16).digest()


def tokenize(processor, texts: Sequence[str]) -> list[list[int]]:
    """The context token ids of each text.

    Raises:
        ValueError: a text longer than the processor's `context_max_length`.
    """
    return processor(contexts=list(texts), padding=False)["context_input_ids"] if texts else []


def tokens_per_call(model) -> int:
    """Tokens that are encoded together: a number of the device alone, so that states do not depend on the clock."""
    return TOKENS_PER_CALL.get(torch.device(getattr(model, "device", "cpu")).type, TOKENS_PER_CALL_ELSEWHERE)


def groups(lengths: Sequence[int], tokens: int) -> Iterator[range]:
    """Neighbours of at most `tokens` together, one at least."""
    start = total = 0
    for index, length in enumerate(lengths):
        if index > start and total + length > tokens:
            yield range(start, index)
            start, total = index, 0
        total += length
    if start < len(lengths):
        yield range(start, len(lengths))


def encode(model, sequences: Sequence[Sequence[int]], dtype: str) -> ContextCache:
    """Encode token sequences, empty ones too, into a cache of `dtype` on the CPU with one row each.

    Raises:
        ValueError: states that are not finite, or not in `dtype`.
    """
    full = [sequence for sequence in sequences if len(sequence)] or [[0]]
    longest = max(map(len, full))
    ids = torch.zeros(len(full), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(full):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
        mask[row, : len(sequence)] = 1
    cache = model.encode_context(ids, mask).to("cpu")
    offsets = offsets_of(map(len, sequences))
    # where all are empty one token was encoded, for the shapes alone
    parts = {name: tensor[: offsets[-1]] for name, tensor in state_parts(cache).items()}
    return convert(cache_of_parts(parts, offsets, cache.fingerprint), dtype)


def convert(cache: ContextCache, dtype: str) -> ContextCache:
    """The cache in a store's dtype: "auto" keeps its own, "int8" and "int4" quantize.

    Raises:
        ValueError: states that are not finite, or not in `dtype`.
    """
    _require_finite(cache, "the model made")
    if dtype in ("auto", str(cache.dtype).removeprefix("torch.")):
        return cache
    converted = cache.quantize(dtype) if dtype in ("int8", "int4") else cache.to(dtype=getattr(torch, dtype))
    _require_finite(converted, f"dtype={dtype!r} cannot hold the range of the model's states: use 'bfloat16'; it made")
    return converted


def _require_finite(cache: ContextCache, who: str) -> None:
    for name, part in state_parts(cache).items():
        # the two ends are enough, NaN propagates to both, and no copy is made
        if part.is_floating_point() and part.numel() and not torch.stack(torch.aminmax(part)).isfinite().all():
            raise ValueError(f"{who} NaN or infinite values in {name!r}; nothing was stored.")
