"""States of the passages, computed once with the frozen encoder and read from a store of encoded states afterwards.

The store's folder is named by what made the states, its documents by the passages' token ids: an interrupted run goes
on with the first missing passage, and runs on the same passages share them.
"""

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from modeling_xcllama import ContextCache, XCLlamaForCausalLM
from xcllama.progress import tracked
from xcllama.store import ContextStore
from xcllama.store.encoding import content_digest

# encoded at once, and together in a file
PASSAGES_AT_ONCE, PASSAGES_PER_COMMIT = 32, 256


class StoredStates(Sequence):
    """States by passage: `states[index]` is `[length, width]`, a view of a mapped file."""

    def __init__(self, store: ContextStore, ids: list[str]):
        self._store, self._ids = store, ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Tensor:
        return self._store.get(self._ids[index]).states["hidden"]


def store_states(
    model: XCLlamaForCausalLM, passages: list[list[int]], folder: Path, is_main: bool = True
) -> StoredStates:
    """Compute what is missing of the states of `passages` (token ids) in the store under `folder`.

    Args:
        is_main: compute; other processes call this once the main one is done.

    Raises:
        ValueError: a passage is missing where another process computes.
    """
    digest = encoder_digest(model)
    store = ContextStore(folder / digest[:16], fingerprint=digest, read_only=not is_main)
    named = {content_digest(ids).hex(): ids for ids in passages}
    missing = [name for name in named if name not in store]
    if missing and not is_main:
        raise ValueError(f"{len(missing)} passages are missing in {folder}; the main process writes them first.")
    batches = [missing[start : start + PASSAGES_AT_ONCE] for start in range(0, len(missing), PASSAGES_AT_ONCE)]
    names: list[str] = []
    caches: list[ContextCache] = []
    for batch in tracked(batches, f"states of {len(missing):,} passages, batches"):
        names += batch
        caches.append(_encode(model, [named[name] for name in batch]))
        if len(names) >= PASSAGES_PER_COMMIT or batch is batches[-1]:
            store.add_cache(names, [""] * len(names), ContextCache.concat(caches))
            names, caches = [], []
    return StoredStates(store, [content_digest(ids).hex() for ids in passages])


def encode_in_memory(model: XCLlamaForCausalLM, passages: list[list[int]]) -> list[Tensor]:
    """The states of a few passages, on no disk."""
    return list(_encode(model, passages).states["hidden"].split([len(ids) for ids in passages]))


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
