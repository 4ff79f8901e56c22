"""Quantized caches: error bounds, sizes, dequantization by blocks only, and every operation that other caches have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modeling_xcllama.context_projection as context_projection
import modeling_xcllama.cross_attention as cross_attention
from modeling_xcllama import ContextCache
from modeling_xcllama.quantized_tensor import QuantizedTensor, quantize

LAYOUTS = {
    "hidden": {},
    "condensed": {"cross_attention_share_key_value": True},
    "hidden_rope": {"cross_attention_rope": True},
    "condensed_rope": {"cross_attention_share_key_value": True, "cross_attention_rope": True},
}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def model(request, make_sharp_model):
    return make_sharp_model(**LAYOUTS[request.param])


def random_ids(*shape, seed=1):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def dequantized(cache: ContextCache) -> ContextCache:
    """The same values as a float cache."""
    flat = cache.layout == "hidden"
    states = {name: state.dequantize(torch.float32) for name, state in cache.states.items()}
    states = {name: state.flatten(1) if flat else state for name, state in states.items()}
    return ContextCache(states, cache.offsets, cache.token_ids, cache.fingerprint, cache.rows)


def distributions(shape, seed):
    """Gaussian data, and Student t with 2 degrees of freedom: a few values hundreds of times the rest."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(shape, generator=generator)
    chi = torch.randn(*shape, 2, generator=generator).square().sum(-1) / 2
    return {"gaussian": gaussian, "heavy": gaussian / chi.sqrt()}


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 3),
    dim=st.sampled_from([2, 8, 64, 128]),
    bits=st.sampled_from([4, 8]),
    magnitude=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_every_value_is_within_half_a_step(tokens, heads, dim, bits, magnitude, seed):
    for states in distributions((tokens, heads, dim), seed).values():
        states = (states * magnitude).clamp(-65504, 65504)
        packed = quantize(states, bits)
        restored = packed.dequantize(torch.float32)
        # the factor of the codes; two outliers of each group stand behind it
        step = packed.scale.float()[..., :1]
        if bits == 8:
            size = states.abs().amax(-1, keepdim=True)
        else:
            groups = states.unflatten(-1, (packed.scale.shape[-2], -1))
            size = groups.abs().amax(-1).repeat_interleave(groups.shape[-1], -1)
            step = step.flatten(-2).repeat_interleave(groups.shape[-1], -1)
        # half a step, and the rounding of scales, zeros and outliers to 16 bit (2**-24 below the normal range)
        assert (restored - states).abs().le(step * 0.501 + size * 2**-9 + 2**-24).all()


@pytest.mark.parametrize(
    ("bits", "name", "bound"), [(8, "gaussian", 0.01), (8, "heavy", 0.05), (4, "gaussian", 0.12), (4, "heavy", 0.25)]
)
def test_relative_error(bits, name, bound):
    states = distributions((2000, 2, 64), 5)[name]
    restored = quantize(states, bits).dequantize(torch.float32)
    error = ((restored - states).norm(dim=-1) / states.norm(dim=-1)).mean()
    # not zero: the data was quantized
    assert bound / 20 < error < bound


@pytest.mark.parametrize("name", ["gaussian", "heavy"])
@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.02), ("int4", 0.2)])
def test_error_of_attention(name, dtype, bound):
    """What a query reads from quantized keys and values is close to what it reads from the floats."""
    states = distributions((500, 2, 64), 7)[name].clamp(-50, 50)
    value = distributions((500, 2, 64), 8)[name].clamp(-50, 50)
    query = torch.randn(1, 6, 4, 64, generator=torch.Generator().manual_seed(9))
    rows = cross_attention.ContextRows((0, 500), (0,))
    bits = 8 if dtype == "int8" else 4
    expected = cross_attention.eager_cross_attention(query, states, value, rows, 0.02)
    got = cross_attention.sdpa_cross_attention(query, quantize(states, bits), quantize(value, bits), rows, 0.02)
    assert (got - expected).norm() / expected.norm() < bound


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_logits_equal_those_of_the_dequantized_values(model, dtype):
    cache = model.encode_context(random_ids(3, 19)).quantize(dtype).join([[0, 2], [1], []])
    ids = random_ids(3, 6, seed=2)
    with torch.no_grad():
        for implementation in ("eager", "sdpa"):
            model.config.cross_attn_implementation = implementation
            got = model(ids, context_cache=cache).logits
            expected = model(ids, context_cache=dequantized(cache)).logits
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    floats = model.encode_context(random_ids(3, 19)).join([[0, 2], [1], []])
    assert (got - model(ids, context_cache=floats).logits).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_generate_equals_the_plain_loop(model, dtype):
    cache = model.encode_context(random_ids(2, 19)).quantize(dtype)
    prompts = random_ids(2, 5, seed=3)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), context_cache=cache, **options)
    for row in range(2):
        ids = prompts[row][None]
        with torch.no_grad():
            for _ in range(6):
                logits = model(ids, context_cache=cache.select([row]), use_cache=False).logits[:, -1]
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=-1)
        assert torch.equal(out[row], ids[0])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_never_dequantized_as_a_whole(model, dtype, monkeypatch):
    """A spy sees every dequantization, of generate and of attention weights: blocks, never the cache."""
    for module in (cross_attention, context_projection):
        monkeypatch.setattr(module, "BLOCK_TOKENS", 16)
    cache = model.encode_context(random_ids(2, 100)).quantize(dtype)
    sizes, original = [], QuantizedTensor.dequantize
    monkeypatch.setattr(
        QuantizedTensor, "dequantize", lambda self, to: sizes.append(self.shape[0]) or original(self, to)
    )
    model.generate(random_ids(2, 4), context_cache=cache.join([[0, 1], [1]]), max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        model(random_ids(2, 4), context_cache=cache, output_attentions=True)
    assert max(sizes) == 16
    # in blocks: the tokens of all documents were dequantized, a few at a time
    assert sum(sizes) >= 200


@pytest.mark.parametrize(("dtype", "smaller"), [("int8", 3.0), ("int4", 4.0)])
def test_nbytes_counts_scales(model, dtype, smaller):
    cache = model.encode_context(random_ids(2, 100))
    small = cache.quantize(dtype)
    stored = sum(tensor.nbytes for state in small.states.values() for tensor in state.tensors())
    values = sum(state.data.nbytes for state in small.states.values())
    assert small.nbytes == stored > values
    assert small.bytes_per_token == stored / 200
    assert small.select([0]).nbytes == stored / 2
    # fp32 to 8 bit is 4 to 1 without scales; heads of 8 channels make them weigh most
    assert cache.nbytes / small.nbytes >= (smaller if cache.layout == "hidden" else smaller * 0.5)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_saved_loaded_concatenated_joined(model, dtype, tmp_path):
    first = model.encode_context(random_ids(2, 19)).quantize(dtype)
    second = model.encode_context(random_ids(1, 11, seed=4)).quantize(dtype)
    both = ContextCache.concat([first, second]).join([[2, 0], [1]])
    both.save(tmp_path / "cache.safetensors")
    loaded = model.load_context(tmp_path / "cache.safetensors")
    assert loaded.dtype == both.dtype == getattr(torch, dtype)
    assert loaded.rows == both.compact().rows
    assert loaded.nbytes == both.nbytes
    assert loaded.lengths == [30, 19]
    for name, state in both.compact().states.items():
        for ours, theirs in zip(state.tensors(), loaded.states[name].tensors(), strict=True):
            assert torch.equal(ours, theirs)
    ids = random_ids(2, 5, seed=5)
    with torch.no_grad():
        got = model(ids, context_cache=loaded).logits
        torch.testing.assert_close(got, model(ids, context_cache=both).logits, atol=1e-5, rtol=1e-5)
        alone = model(ids[1:], context_cache=first.select([1])).logits
        torch.testing.assert_close(got[1:], alone, atol=2e-4, rtol=2e-4)


def test_sixteen_bit_models_and_caches(model, tmp_path, make_sharp_model):
    half = make_sharp_model(**{k: getattr(model.config, k) for k in ("cross_attention_share_key_value",)}).bfloat16()
    cache = half.encode_context(random_ids(2, 19))
    assert cache.dtype == torch.bfloat16
    small = cache.quantize("int8")
    ids = random_ids(2, 5)
    with torch.no_grad():
        got = half(ids, context_cache=small).logits.float()
        expected = half(ids, context_cache=dequantized(small).to(dtype=torch.bfloat16)).logits.float()
    assert (got - expected).norm() / expected.norm() < 0.05


def test_auto_leaves_rotated_quantized_keys_to_sdpa(monkeypatch, make_sharp_model):
    """The kernels cannot rotate what they dequantize: "auto" knows, an explicit choice is refused."""
    model = make_sharp_model(**LAYOUTS["condensed_rope"])
    cache = model.encode_context(random_ids(1, 9))
    rotated = model.project_context(cache.quantize("int8"))
    plain = model.project_context(cache)
    monkeypatch.setattr(cross_attention, "kernels_installed", lambda: True)
    device = torch.device("cuda")
    assert cross_attention.resolve_implementation("auto", device, rotated.keys[0]) == "sdpa"
    assert cross_attention.resolve_implementation("auto", device, plain.keys[0]) == "triton"
    query = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="no quantized keys with RoPE"):
        cross_attention.triton_cross_attention(query, rotated.keys[0], rotated.values[0], rotated.rows, 1.0)


def test_clear_errors(model):
    cache = model.encode_context(random_ids(2, 9))
    small = cache.quantize("int8")
    with pytest.raises(ValueError, match="'int8', 'int4', got 'int2'"):
        cache.quantize("int2")
    with pytest.raises(ValueError, match="already; quantize the 16-bit cache"):
        small.quantize("int4")
    with pytest.raises(ValueError, match="cannot be converted"):
        small.to(dtype=torch.float16)
    with pytest.raises(ValueError, match="must have one dtype"):
        ContextCache.concat([cache, small])
    with pytest.raises(ValueError, match="must lie within 65504"):
        quantize(torch.full((1, 1, 2), 1e5), 4)
    odd = {"hidden": torch.zeros(4, 63)}
    with pytest.raises(ValueError, match="even head width"):
        ContextCache(odd, (0, 4), torch.zeros(4).int(), "f").quantize("int4")
