"""A stand-in for model and processor: states that follow from the text alone, so that any test can recompute them."""

import time
from types import SimpleNamespace

import pytest
import torch

from modeling_xcllama.context_cache import ContextCache
from xcllama.store import ContextStore

WIDTH = 16


class ByteProcessor:
    """Tokens are UTF-8 bytes."""

    template_version = "1"

    def __call__(self, contexts, padding=False):
        return {"context_input_ids": [list(text.encode()) for text in contexts]}


class TableModel:
    """The state of a token is its row in a random table: no batch, no order, no rounding."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(256, WIDTH, generator=generator).to(dtype)
        self.dtype = dtype
        self.fingerprint = f"table-{seed}"
        self.model = SimpleNamespace(context_fingerprint=lambda: self.fingerprint)
        self.encoded = 0

    def encode_context(self, ids, mask):
        rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
        self.encoded += len(rows)
        offsets = [0]
        for row in rows:
            offsets.append(offsets[-1] + len(row))
        tokens = torch.cat(rows)
        return ContextCache({"hidden": self.table[tokens]}, tuple(offsets), tokens.int(), self.fingerprint)

    def states(self, text: str) -> torch.Tensor:
        return self.table[torch.tensor(list(text.encode()), dtype=torch.long)]


def row_states(cache, row: int) -> torch.Tensor:
    """The states that a row of a cache reads."""
    (state,) = cache.states.values()
    spans = [(cache.offsets[d], cache.offsets[d + 1]) for d in cache.rows[row]]
    if not isinstance(state, torch.Tensor):
        state = state.dequantize(torch.float32).flatten(1)
    return torch.cat([state[start:end] for start, end in spans])


def whole_store(path, model=None, **options) -> ContextStore:
    """A store of the stand-ins whose documents are not split: what is asked of a document is asked of its states."""
    return ContextStore(path, model or TableModel(), ByteProcessor(), **({"passage_tokens": None} | options))


@pytest.fixture
def model():
    return TableModel()


@pytest.fixture
def store(tmp_path, model):
    with whole_store(tmp_path / "corpus.xcs", model) as store:
        yield store


def assert_states(store, model, documents: dict[str, str]) -> None:
    """What the store serves for `documents` is what the model computes from them."""
    cache = store.get(list(documents))
    for row, text in enumerate(documents.values()):
        assert torch.equal(row_states(cache, row), model.states(text))
        assert cache.row_token_ids(row).tolist() == list(text.encode())


class SlowModel(TableModel):
    """Takes its time, so that a worker can be killed at work."""

    def encode_context(self, ids, mask):
        time.sleep(0.4)
        return super().encode_context(ids, mask)


def load_slow() -> tuple:
    """What a Ray actor loads."""
    return SlowModel(), ByteProcessor()
