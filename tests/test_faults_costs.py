"""A request costs what it reads: bytes and calls are counted, not seconds."""

import pytest
import torch

from modeling_xcllama import ContextCache, context_cache
from modeling_xcllama.quantized_tensor import QuantizedTensor

IDS = torch.arange(3, 14)[None]


def many(model, count: int) -> ContextCache:
    """So many documents of eleven tokens."""
    one = model.encode_context(IDS)
    states = {name: state.repeat(count, *[1] * (state.dim() - 1)) for name, state in one.states.items()}
    return ContextCache(states, tuple(range(0, 11 * count + 1, 11)), one.token_ids.repeat(count), one.fingerprint)


@pytest.fixture
def moved(monkeypatch) -> list[int]:
    """Bytes of every tensor that is brought to a device."""
    seen, to = [], torch.Tensor.to

    def watch(tensor, *arguments, **options):
        if any(isinstance(value, torch.device) for value in (*arguments, *options.values())):
            seen.append(tensor.nbytes)
        return to(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", watch)
    return seen


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("condensed", [False, True], ids=["hidden", "condensed"])
@pytest.mark.parametrize("rows", [[[700]], [[3, 998]], [[5], [], [5, 6]]], ids=str)
def test_rows_are_picked_before_they_move(tiny_base, make_model, moved, dtype, condensed, rows):
    model = make_model(tiny_base, cross_attention_share_key_value=condensed)
    cache = many(model, 1000)
    cache = cache if dtype is None else cache.quantize(dtype)
    moved.clear()
    projected = model.project_context(cache.join(rows))
    read = len({document for row in rows for document in row})
    states = sum(state.nbytes for state in cache.states.values()) * read // 1000
    assert 0 < sum(moved) <= states + 4096
    with torch.no_grad():
        ids = IDS.expand(len(rows), -1)
        few = cache.join(rows).compact()
        torch.testing.assert_close(model(ids, context_cache=projected).logits, model(ids, context_cache=few).logits)


def test_selecting_looks_at_what_is_selected(monkeypatch):
    """A million documents: nothing is checked or copied again for a row of them."""
    count = 1_000_000
    cache = ContextCache({"hidden": torch.zeros(count, 1)}, tuple(range(count + 1)), torch.zeros(count).int(), "f")
    monkeypatch.setattr(ContextCache, "__post_init__", lambda self: pytest.fail("checked again"))
    monkeypatch.setattr(context_cache, "check_finite", lambda *_: pytest.fail("read again"))
    touched = []

    class Watched(tuple):
        def __getitem__(self, index):
            touched.append(index)
            return super().__getitem__(index)

        def __iter__(self):
            pytest.fail("all of it")

    object.__setattr__(cache, "rows", Watched(cache.rows))
    object.__setattr__(cache, "offsets", Watched(cache.offsets))
    picked = cache.select([7, 999_999]).select([1])
    joined = cache.join([[5, 6]])
    assert (picked.rows, joined.rows) == (((999_999,),), ((5, 6),))
    assert (picked.lengths, picked.num_tokens, joined.lengths) == ([1], 1, [2])
    assert len(touched) < 40
    assert picked.states["hidden"].data_ptr() == cache.states["hidden"].data_ptr()


def test_moving_reads_nothing_twice(tiny_model, monkeypatch):
    """A device would have to be waited for."""
    cache = tiny_model.encode_context(IDS)
    monkeypatch.setattr(context_cache, "check_finite", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(QuantizedTensor, "check", lambda *_: pytest.fail("read"))
    assert cache.to("meta").device.type == "meta"
    assert cache.to("cpu", torch.float32) is cache


def test_quantized_contexts_are_projected_block_by_block(tiny_model, monkeypatch):
    """What is dequantized at a time is a block, whatever the size of the cache."""
    from modeling_xcllama import context_projection

    cache = many(tiny_model, 30).quantize("int8")
    sizes, dequantize = [], QuantizedTensor.dequantize
    monkeypatch.setattr(
        QuantizedTensor, "dequantize", lambda self, dtype: sizes.append(self.shape[0]) or dequantize(self, dtype)
    )
    monkeypatch.setattr(context_projection, "BLOCK_TOKENS", 100)
    tiny_model.project_context(cache)
    assert sum(sizes) == 330
    assert max(sizes) == 100


def test_one_fingerprint_of_unchanged_weights_is_computed_once(tiny_model, monkeypatch):
    from modeling_xcllama import fingerprint

    cache = tiny_model.encode_context(IDS)
    monkeypatch.setattr(fingerprint, "weights_digest", lambda *_: pytest.fail("computed again"))
    for _ in range(3):
        tiny_model(IDS, context_cache=cache)
        tiny_model.encode_context(IDS)
