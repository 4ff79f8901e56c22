"""States of the passages, computed once with the frozen encoder and read from disk through mmap afterwards.

They lie in shards of 256 passages (ordinary context caches), named by the passages' token ids, in a folder named by
what made them: an interrupted run goes on with the first missing shard, and runs on the same passages share them.
"""

import hashlib
import logging
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from modeling_xcllama import ContextCache, XCLlamaForCausalLM

logger = logging.getLogger(__name__)

SHARD_PASSAGES = 256


class StoredStates:
    """States by passage: `states[index]` is `[length, width]`, a view of a mapped file."""

    def __init__(self, caches: list[ContextCache]):
        self._spans: list[tuple[Tensor, int, int]] = []
        for cache in caches:
            hidden = cache.states["hidden"]
            self._spans += [
                (hidden, start, end) for start, end in zip(cache.offsets[:-1], cache.offsets[1:], strict=True)
            ]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Tensor:
        hidden, start, end = self._spans[index]
        return hidden[start:end]


def store_states(
    model: XCLlamaForCausalLM, passages: list[list[int]], folder: Path, is_main: bool = True
) -> StoredStates:
    """Compute what is missing of the states of `passages` (token ids) under `folder`, and map all of it.

    Args:
        is_main: compute; other processes call this once the main one is done.

    Raises:
        ValueError: a shard is damaged; it names the file.
    """
    folder = folder / encoder_digest(model)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    caches = []
    for start in range(0, len(passages), SHARD_PASSAGES):
        shard = passages[start : start + SHARD_PASSAGES]
        path = folder / f"states-{hashlib.sha256(repr(shard).encode()).hexdigest()[:16]}.safetensors"
        if not path.is_file():
            if not is_main:
                raise ValueError(f"{path} is missing; the main process writes it first.")
            _encode(model, shard).save(path)
            logger.info("states of %d / %d passages", min(start + SHARD_PASSAGES, len(passages)), len(passages))
        caches.append(ContextCache.load(path, verify=False))
    return StoredStates(caches)


def encode_in_memory(model: XCLlamaForCausalLM, passages: list[list[int]]) -> StoredStates:
    """The states of a few passages, on no disk."""
    return StoredStates([_encode(model, passages)])


@torch.no_grad()
def _encode(model: XCLlamaForCausalLM, passages: list[list[int]]) -> ContextCache:
    """The packed states of `passages` in their order: those that get projected, whatever the layout of caches."""
    offsets = tuple(accumulate(map(len, passages), initial=0))
    token_ids = torch.tensor([token for ids in passages for token in ids], dtype=torch.int32)
    hidden = model.model.encode_packed([torch.tensor(ids, device=model.device) for ids in passages]).cpu()
    return ContextCache({"hidden": hidden}, offsets, token_ids, encoder_digest(model))


def encoder_digest(model: XCLlamaForCausalLM) -> str:
    """Digest of what shapes the states, and of their dtype."""
    return hashlib.sha256(f"{model.model.context_fingerprint('hidden')} {model.dtype}".encode()).hexdigest()
