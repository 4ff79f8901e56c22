"""Forward and decode kernels against the float64 reference, under Triton's interpreter."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import math  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from xcllama_kernels import cross_attention, cross_attention_with_lse  # noqa: E402
from xcllama_kernels.cases import Case, random_case, relative_error  # noqa: E402
from xcllama_kernels.configs import family  # noqa: E402
from xcllama_kernels.decode import plan_decode, rows_a_tile  # noqa: E402
from xcllama_kernels.launch import INTERPRETED, Config, Quantization, Target, launch_counts  # noqa: E402
from xcllama_kernels.reference import cross_attention_reference  # noqa: E402

if not INTERPRETED:
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set; `make test` sets it", allow_module_level=True)

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["fp32", "fp16", "bf16"])
BITS = pytest.mark.parametrize("bits", [0, 8, 4], ids=["plain", "int8", "int4"])


@pytest.fixture(autouse=True)
def _poison_new_memory():
    """Every torch.empty holds NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_matches(case: Case, result: tuple[torch.Tensor, torch.Tensor]) -> None:
    output, lse = result
    expected, expected_lse = cross_attention_reference(*case.arguments, **case.quantization)
    # what is dequantized is rounded to the query's dtype once more than the reference rounds it
    tolerance = TOLERANCES[case.query.dtype] * (2 if case.quantization else 1)
    assert output.dtype == case.query.dtype
    assert relative_error(output, expected) < tolerance
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert (lse[~finite] == -math.inf).all()
    assert relative_error(lse[finite], expected_lse[finite]) < tolerance


def check(case: Case, kernel: str) -> None:
    before = launch_counts[kernel]
    result = cross_attention_with_lse(*case.arguments, **case.quantization)
    assert launch_counts[kernel] > before, f"{kernel} did not run"
    assert_matches(case, result)


@DTYPES
@BITS
@pytest.mark.parametrize(
    ("lengths", "query_len", "heads", "head_dim"),
    [([65, 0, 3], 37, (6, 3), 48), ([1, 129], 17, (4, 1), 32)],
    ids=["gqa2", "mqa"],
)
def test_forward(lengths, query_len, heads, head_dim, dtype, bits):
    rows = [len(lengths) - 1, *range(len(lengths))]
    check(random_case(lengths, rows, query_len, *heads, head_dim, dtype, bits), "forward_kernel")


@DTYPES
@BITS
@pytest.mark.parametrize(
    ("lengths", "rows", "query_len", "heads", "head_dim"),
    [
        ([5, 0, 130, 64], [2, 1, 2, 0, 3, 2], 1, (9, 3), 64),
        ([200], [0], 3, (4, 4), 16),
    ],
    ids=["shared", "one-row"],
)
def test_decode(lengths, rows, query_len, heads, head_dim, dtype, bits):
    check(random_case(lengths, rows, query_len, *heads, head_dim, dtype, bits), "decode_kernel")


@pytest.mark.parametrize("head_dim", [24, 80, 128, 192, 256])
@pytest.mark.parametrize("bits", [0, 8, 4], ids=["plain", "int8", "int4"])
def test_head_dims(head_dim, bits):
    if bits == 4 and head_dim == 80:
        pytest.skip("int4 groups are 64 channels")
    check(random_case([70, 1], [0, 1, 0], 1, 4, 2, head_dim, torch.float16, bits), "decode_kernel")
    check(random_case([70, 1], [0, 1], 33, 2, 1, head_dim, torch.float16, bits), "forward_kernel")


@pytest.mark.parametrize("num_splits", [1, 2, 7])
@BITS
def test_decode_splits_are_combined(num_splits, bits):
    case = random_case([300, 0, 1, 64], [0, 1, 2, 3, 0], 2, 4, 2, 32, torch.float32, bits)
    output = torch.empty_like(case.query)
    lse = torch.empty(5, 4, 2)
    launches = plan_decode(
        *case.arguments[:3], Quantization(**case.quantization), *case.arguments[3:], output, lse, 32**-0.5,
        num_splits=num_splits, config=Config(16, 32, 4, 2),
    )  # fmt: skip
    assert len(launches) == (1 if num_splits == 1 else 2)
    for launch in launches:
        launch.run()
    assert_matches(case, (output, lse))


def test_rows_that_share_a_context_are_in_one_tile():
    assert rows_a_tile(batch=32, num_contexts=1, query_len=1, group=4, most=128) == 128
    assert rows_a_tile(batch=32, num_contexts=8, query_len=1, group=4, most=128) == 16
    case = random_case([40, 30], [1, 0, 1, 1, 0, 1, 1, 1, 0, 1], 1, 4, 1, 32)
    check(case, "decode_kernel")


def test_chips_share_configurations():
    found = [family(Target("cuda", arch, 1)) for arch in (80, 86, 89, 90, 100, 103, 120)]
    assert found == ["ampere"] * 3 + ["hopper"] + ["blackwell"] * 2 + ["ampere"]
    assert family(Target("hip", "gfx942", 1)) == "cdna"


@pytest.mark.parametrize("index", [-1, 0, 2**30])
def test_unchecked_indices_stay_within_the_tensors(index):
    """A CUDA graph replays whatever its indices hold: the kernels clamp them."""
    case = random_case([40, 30], [0, 0, 0], 1, 4, 1, 32)
    context_index = torch.full((3,), index, dtype=torch.int32)
    around = torch.zeros(9, *case.query.shape[1:])
    inputs = (*case.arguments[:3], Quantization(), case.offsets, context_index)
    for launch in plan_decode(*inputs, around[3:6], torch.empty(3, 4, 1), 32**-0.5, num_splits=1):
        launch.run()
    assert (around[:3] == 0).all()
    assert (around[6:] == 0).all()
    clamped = torch.full((3,), min(max(index, 0), 1), dtype=torch.int32)
    expected, _ = cross_attention_reference(*case.arguments[:4], clamped)
    assert relative_error(around[3:6], expected) < 1e-5


def test_eight_thousand_tokens():
    check(random_case([8192], [0, 0], 1, 2, 1, 32), "decode_kernel")
    check(random_case([8192], [0], 65, 1, 1, 32, torch.float16), "forward_kernel")


def test_scores_of_hundreds_do_not_overflow():
    case = random_case([100, 50], [0, 1], 2)
    case.query.mul_(100)
    check(case, "decode_kernel")


def test_other_tokens_are_never_read():
    case = random_case([5, 33, 70], [1, 1], 1)
    expected = cross_attention(*case.arguments)
    for states in (case.key, case.value):
        states[:5] = math.nan
        states[38:] = math.nan
    assert torch.equal(cross_attention(*case.arguments), expected)


@pytest.mark.parametrize("query_len", [1, 40], ids=["decode", "forward"])
def test_strided_inputs(query_len):
    case = random_case([45, 20], [1, 0], query_len)
    expected = cross_attention(*case.arguments)
    query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((65, 5, 40), math.nan)
    wide[:, 1:3, 4:36] = case.key
    value = case.value.transpose(0, 2).contiguous().transpose(0, 2)
    index = torch.stack([case.context_index, case.context_index], 1)[:, 0]
    result = cross_attention(query, wide[:, 1:3, 4:36], value, case.offsets, index)
    assert torch.equal(result, expected)


def test_int64_offsets_and_indices():
    case = random_case([45, 20], [1, 0])
    result = cross_attention(*case.arguments[:3], case.offsets.long(), case.context_index.long())
    assert torch.equal(result, cross_attention(*case.arguments))


def test_tokens_outside_every_context_and_no_tokens():
    case = random_case([10, 20, 30], [0], 1)
    output = cross_attention(*case.arguments[:3], torch.tensor([10, 30], dtype=torch.int32), case.context_index)
    middle = random_case([10, 20, 30], [1], 1)
    torch.testing.assert_close(output, cross_attention(*middle.arguments))
    empty = random_case([0, 0], [1, 0], 1)
    assert (cross_attention(*empty.arguments) == 0).all()
    for rows, query_len in (([], 1), ([0], 0)):
        nothing = random_case([3], rows, query_len)
        nothing.key.requires_grad_()
        output = cross_attention(*nothing.arguments)
        assert output.shape == (len(rows), query_len, 4, 32)
        output.sum().backward()
        assert (nothing.key.grad == 0).all()


def test_scale():
    case = random_case([30], [0])
    expected, _ = cross_attention_reference(*case.arguments, scale=0.5)
    assert relative_error(cross_attention(*case.arguments, scale=0.5), expected) < 1e-5


def far_apart(states: torch.Tensor, dim: int, stride: int) -> torch.Tensor:
    """A copy whose steps along `dim` are `stride` elements; memory that is never touched costs nothing."""
    strides = [*states.stride()]
    strides[dim] = stride
    storage = torch.empty(stride * (states.shape[dim] - 1) + states.numel(), dtype=states.dtype)
    return storage.as_strided(states.shape, strides).copy_(states)


@pytest.mark.parametrize("query_len", [1, 70], ids=["decode", "forward"])
def test_addresses_beyond_32_bits(query_len):
    # nothing may fill what is far apart
    torch.use_deterministic_algorithms(False)
    case = random_case([2], [0], query_len, 3, 1, 64, torch.float16, bits=8)
    query, key = far_apart(case.query, 2, 2**30 + 16), far_apart(case.key, 0, 2**31 + 16)
    moved = Case(query, key, case.value, case.offsets, case.context_index, case.quantization)
    check(moved, "decode_kernel" if query_len == 1 else "forward_kernel")


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    batch=st.integers(1, 5),
    query_len=st.sampled_from([1, 2, 5, 33]),
    heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (5, 1)]),
    head_dim=st.sampled_from([16, 32, 40]),
    dtype=st.sampled_from(list(TOLERANCES)),
    bits=st.sampled_from([0, 8, 4]),
    data=st.data(),
)
def test_any_shape(lengths, batch, query_len, heads, head_dim, dtype, bits, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=batch, max_size=batch))
    case = random_case(lengths, rows, query_len, *heads, head_dim, dtype, bits)
    assert_matches(case, cross_attention_with_lse(*case.arguments, **case.quantization))
