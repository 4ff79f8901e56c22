"""Quantized formats, and the projection of quantized hidden states, against float64."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from xcllama_kernels import dequantize_int4, dequantize_int8, project_quantized  # noqa: E402
from xcllama_kernels.cases import random_quantized, relative_error  # noqa: E402
from xcllama_kernels.launch import INTERPRETED, launch_counts  # noqa: E402
from xcllama_kernels.reference import project_quantized_reference  # noqa: E402

from modeling_xcllama.quantized_tensor import quantize  # noqa: E402

if not INTERPRETED:
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set; `make test` sets it", allow_module_level=True)

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _poison_new_memory():
    """Every torch.empty holds NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def quantized(num_tokens: int, heads: int, dim: int, bits: int):
    """Data, scale and zero of states with outliers."""
    return random_quantized(num_tokens, heads, dim, bits, torch.Generator().manual_seed(dim))


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("num_tokens", "heads", "dim", "out", "norm", "bias"),
    [
        (5, 9, 64, 96, True, False),
        (70, 1, 40, 65, False, True),
        (3, 2, 192, 64, True, True),
        (1, 1, 16, 1, True, False),
    ],
)
def test_projection(num_tokens, heads, dim, out, norm, bias, bits, dtype):
    width = heads * dim
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(out, width, generator=generator) / width**0.5).to(dtype)
    options = {"bias": torch.randn(out, generator=generator).to(dtype) if bias else None}
    if norm:
        options |= {"norm_weight": (1 + torch.rand(width, generator=generator)).to(dtype), "norm_eps": 1e-5}
    states = quantized(num_tokens, heads, dim, bits)
    before = launch_counts.copy()
    result = project_quantized(*states, weight, **options)
    assert launch_counts["project_kernel"] == before["project_kernel"] + 1
    assert launch_counts["inverse_rms_kernel"] == before["inverse_rms_kernel"] + norm
    assert result.dtype == dtype
    assert relative_error(result, project_quantized_reference(*states, weight, **options)) < TOLERANCES[dtype]


def test_projection_of_strided_rows_and_weight():
    states, scale, _ = quantized(6, 2, 64, 8)
    weight = torch.randn(128, 40).T
    expected = project_quantized(states, scale, None, weight.contiguous())
    assert torch.equal(project_quantized(states.repeat(1, 2, 1)[:, :2], scale, None, weight), expected)
    assert torch.equal(
        project_quantized(states.transpose(0, 1).contiguous().transpose(0, 1), scale, None, weight), expected
    )


def test_projection_of_addresses_beyond_32_bits():
    # memory that is never touched costs nothing, so nothing may fill it
    torch.use_deterministic_algorithms(False)
    states, scale, _ = quantized(2, 1, 64, 8)
    weight = torch.randn(3, 64)
    far = torch.empty(2**31 + 16 + 64, dtype=torch.int8).as_strided((2, 1, 64), (2**31 + 16, 64, 1)).copy_(states)
    rows = torch.empty(2 * (2**30 + 16) + 64).as_strided((3, 64), (2**30 + 16, 1)).copy_(weight)
    assert torch.equal(project_quantized(far, scale, None, rows), project_quantized(states, scale, None, weight))


def test_projection_of_no_tokens():
    states, scale, _ = quantized(0, 1, 64, 8)
    assert project_quantized(states, scale, None, torch.randn(3, 64)).shape == (0, 3)


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 3),
    dim=st.sampled_from([2, 16, 40, 64, 128, 192]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_quantization_error_is_half_a_step(heads, dim, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    states = spread * torch.randn(4, heads, dim, generator=generator) + spread
    states[:, :, dim // 2] *= 100
    for bits in (8, 4):
        stored = quantize(states, bits)
        stored.check("states")
        groups = (dim // min(dim, 64),) if bits == 4 else ()
        assert stored.shape == states.shape
        assert stored.scale.shape == (4, heads, *groups, 3)
        # half a step, what rounding scale and zero to float16 can clip, and the rounding of the outliers
        step, outliers = stored.scale.float()[..., :1], stored.scale.float()[..., 1:]
        zero = 0 if stored.zero is None else stored.zero.float().abs().amax(-1)
        error = (stored.dequantize(torch.float32) - states).abs().unflatten(-1, (*groups, -1) if groups else (-1,))
        bound = 0.5 * step[..., 0] + 127 * step[..., 0] * 2**-10 + 1e-5
        bound = bound + (zero if bits == 8 else zero[..., None]) * 2**-10
        assert (error.amax(-1) <= torch.maximum(bound, outliers.abs().amax(-1) * 2**-10)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_format_is_that_of_the_context_cache(bits):
    """`quantize` is the one home of the format; the kernels' oracle reads what it writes."""
    states = torch.randn(6, 2, 128, generator=torch.Generator().manual_seed(0))
    states[:, :, 70] *= 50
    stored = quantize(states, bits)
    if bits == 8:
        result = dequantize_int8(stored.data, stored.scale)
    else:
        result = dequantize_int4(stored.data, stored.scale, stored.zero)
    torch.testing.assert_close(result, stored.dequantize(torch.float32))
    assert relative_error(result, states) < (0.01 if bits == 8 else 0.1)


def test_int4_layout():
    # the two that widen the range the most are kept, the others are steps of one
    states = torch.arange(14.0).repeat(5)[:64][None, None].clone()
    states[0, 0, [3, 40]] = torch.tensor([1000.0, -500.0])
    stored = quantize(states, 4)
    factor, *outliers = stored.scale[0, 0, 0].tolist()
    assert (factor, stored.zero.item()) == (1, 0)
    assert sorted(outliers) == [-500, 1000]
    codes = torch.cat([stored.data & 15, stored.data >> 4], -1)[0, 0]
    assert sorted(codes[[3, 40]].tolist()) == [14, 15]
    others = [channel for channel in range(64) if channel not in (3, 40)]
    assert codes[others].tolist() == [channel % 14 for channel in others]
    assert torch.equal(stored.dequantize(torch.float32), states)


def test_quantization_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="multiple of 64 above 64.*got 96"):
        quantize(torch.randn(1, 1, 96), 4)
    for value in (torch.inf, torch.nan, -1e6):
        for bits in (8, 4):
            with pytest.raises(ValueError, match="must lie within 65504"):
                quantize(torch.full((1, 1, 64), value), bits)
