"""Fast paths of decoding and projecting: each ran, and gives what the plain one gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_xcllama import cross_attention, cross_attention_block
from modeling_xcllama.cross_attention import ContextRows


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 2])])
def test_the_head_reads_a_matrix(tiny_model, batch, keep):
    seen = []
    with torch.no_grad():
        everything = tiny_model(batch["input_ids"]).logits
        tiny_model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].dim()))
        logits = tiny_model(batch["input_ids"], logits_to_keep=keep).logits
    kept = everything[:, keep] if isinstance(keep, torch.Tensor) else everything[:, -keep:]
    assert seen == [2]
    torch.testing.assert_close(logits, kept)


def test_rows_on_one_context_are_one_call(tiny_model, batch, monkeypatch):
    calls = []
    sdpa = cross_attention._attend_sdpa

    def watched(query, key, value, scale):
        calls.append((query, key))
        return sdpa(query, key, value, scale)

    monkeypatch.setattr(cross_attention, "_attend_sdpa", watched)
    cache = tiny_model.encode_context(batch["context_input_ids"][:1])
    projected = tiny_model.project_context(cache.select([0] * 5))
    prompt = torch.randint(3, 97, (5, 4), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        together = tiny_model(prompt, context_cache=projected).logits
        blocks = len(tiny_model.model.cross_attention_blocks)
        assert len(calls) == blocks
        for query, key in calls:
            # two query heads on each of two key heads, five rows of four tokens; the keys are read in place
            assert query.shape == (2, 5 * 4 * 2, 8)
            assert key.is_contiguous()
            assert key.data_ptr() in [keys.data_ptr() for keys in projected.keys]
        for row in range(5):
            alone = tiny_model(prompt[row : row + 1], context_cache=cache).logits
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_rows_in_any_order(data, lengths):
    """Whatever rows read which contexts, empty ones too: each row gets what it would get alone."""
    index = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    offsets = tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))
    rows = ContextRows(offsets, tuple(index))
    generator = torch.Generator().manual_seed(sum(lengths))
    key, value = (torch.randn(offsets[-1], 2, 4, generator=generator) for _ in range(2))
    query = torch.randn(len(index), 3, 4, 4, generator=generator)
    got = cross_attention.sdpa_cross_attention(query, key, value, rows, 0.5)
    for row, context in enumerate(index):
        start, end = offsets[context], offsets[context + 1]
        expected = torch.zeros_like(query[row])
        if start < end:
            keys, values = (part[start:end].repeat_interleave(2, dim=1) for part in (key, value))
            weights = (torch.einsum("qhd,khd->hqk", query[row], keys) * 0.5).softmax(-1)
            expected = torch.einsum("hqk,khd->qhd", weights, values)
        torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=1e-5)
    assert rows.groups is rows.groups
    assert rows.order is rows.order


@pytest.mark.parametrize("native", [True, False], ids=["native", "emulated"])
@pytest.mark.parametrize("queries", [1, 40, 400])
def test_few_queries_are_products(queries, native, monkeypatch):
    """In bfloat16 of the CPU's own without gradients, else flash."""
    monkeypatch.setattr(cross_attention, "has_native_products", lambda dtype: native)
    ran = []
    products = cross_attention._attend_products
    monkeypatch.setattr(
        cross_attention, "_attend_products", lambda *inputs: ran.append(inputs[0].dtype) or products(*inputs)
    )
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, queries, 4, 16, generator=generator)
    key, value = (torch.randn(50, 2, 16, generator=generator) for _ in range(2))
    rows = ContextRows((0, 50), (0,))
    exact = cross_attention.sdpa_cross_attention(query, key, value, rows, 0.25)
    half = [tensor.bfloat16() for tensor in (query, key, value)]
    cross_attention.sdpa_cross_attention(*half, rows, 0.25)
    # gradients are wanted
    assert ran == []
    with torch.no_grad():
        got = cross_attention.sdpa_cross_attention(*half, rows, 0.25)
    # two query heads share a head of keys
    few = native and 2 * queries <= cross_attention.PRODUCT_QUERIES
    assert ran == [torch.bfloat16] * few
    torch.testing.assert_close(got.float(), exact, atol=2e-2, rtol=2e-2)


def test_projections_share_one_normalization(tiny_base, make_model, batch, monkeypatch):
    tiny_model = make_model(tiny_base, context_layer=2, cross_attention_layers=[1, 3])
    calls = []
    normalize = torch.nn.functional.rms_norm
    monkeypatch.setattr(
        cross_attention_block.functional, "rms_norm", lambda *args: calls.append(1) or normalize(*args), raising=True
    )
    products = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(cross_attention_block.functional, "linear", lambda *args: products.append(1) or linear(*args))
    cache = tiny_model.encode_context(batch["context_input_ids"])
    products.clear()
    projected = tiny_model.project_context(cache)
    # keys and values of a projection in one product
    assert len(products) == len(projected.keys)
    assert len(calls) == 1
    assert len(projected.keys) == len(tiny_model.model.context_projections) > 1
    with torch.no_grad():
        for projection, key, value in zip(
            tiny_model.model.context_projections, projected.keys, projected.values, strict=True
        ):
            for ours, theirs in zip((key, value), projection(cache.states["hidden"]), strict=True):
                torch.testing.assert_close(ours, theirs)
                assert ours.transpose(0, 1).is_contiguous()
