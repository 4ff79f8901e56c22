"""Texts to packed states, in groups of bounded size: what `ContextStore.add` and the bulk encoder share."""

from collections.abc import Iterator, Sequence

import torch

from modeling_xcllama.context_cache import ContextCache

from .shards import cache_of_parts, offsets_of, state_parts

TOKENS_PER_GROUP = 16384


def tokenize(processor, ids: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """The context token ids of each text.

    Raises:
        ValueError: a text longer than the processor's `context_max_length`; names the document.
    """
    try:
        return processor(contexts=list(texts), padding=False)["context_input_ids"]
    except ValueError:
        if len(texts) == 1:
            raise
    sequences = []
    for document_id, text in zip(ids, texts, strict=True):
        try:
            sequences += processor(contexts=[text], padding=False)["context_input_ids"]
        except ValueError as error:
            raise ValueError(f"document {document_id!r} cannot be encoded: {error}") from error
    return sequences


def groups(lengths: Sequence[int], tokens_per_group: int = TOKENS_PER_GROUP) -> Iterator[range]:
    """Neighbours of at most `tokens_per_group` tokens together, one at least."""
    start = total = 0
    for index, length in enumerate(lengths):
        if index > start and total + length > tokens_per_group:
            yield range(start, index)
            start, total = index, 0
        total += length
    if start < len(lengths):
        yield range(start, len(lengths))


def encode(model, sequences: Sequence[Sequence[int]]) -> ContextCache:
    """Encode token sequences, empty ones too, into a cache on the CPU with one row each."""
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
    return cache_of_parts(parts, offsets, cache.fingerprint)


def convert(cache: ContextCache, dtype: str) -> ContextCache:
    """The cache in a store's dtype: "int8" and "int4" quantize."""
    if dtype in ("int8", "int4"):
        return cache if str(cache.dtype) == f"torch.{dtype}" else cache.quantize(dtype)
    return cache.to(dtype=getattr(torch, dtype))
