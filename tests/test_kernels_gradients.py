"""Backward kernels against autograd through the float64 reference, and the torch.library registration."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from xcllama_kernels import cross_attention, cross_attention_with_lse, project_quantized  # noqa: E402
from xcllama_kernels.backward import plan_backward  # noqa: E402
from xcllama_kernels.cases import Case, random_case, random_quantized, relative_error  # noqa: E402
from xcllama_kernels.launch import INTERPRETED, Quantization, launch_counts  # noqa: E402
from xcllama_kernels.ops import (  # noqa: E402
    cross_attention_backward_op,
    cross_attention_op,
    project_quantized_op,
)
from xcllama_kernels.reference import cross_attention_reference  # noqa: E402

if not INTERPRETED:
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set; `make test` sets it", allow_module_level=True)

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
BACKWARD_KERNELS = ("query_gradient_kernel", "context_gradient_kernel")


@pytest.fixture(autouse=True)
def _poison_new_memory():
    """Every torch.empty holds NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(case: Case, attend, grad_output: torch.Tensor, grad_lse: torch.Tensor | None, dtype=None):
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in case.arguments[:3]]
    output, lse = attend(*leaves, case.offsets, case.context_index)
    if not output.requires_grad:
        # the reference of rows with empty contexts only
        return [None] * 3
    outputs, grads = [output], [grad_output.to(output.dtype)]
    if grad_lse is not None:
        outputs.append(lse)
        grads.append(grad_lse.to(lse.dtype))
    torch.autograd.backward(outputs, grads)
    return [leaf.grad for leaf in leaves]


def check(case: Case, with_lse: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(case.query.shape, generator=generator).to(case.query.dtype)
    batch, query_len, num_heads, _ = case.query.shape
    grad_lse = torch.randn(batch, num_heads, query_len, generator=generator) if with_lse else None
    if with_lse:
        # an empty context has no log-sum-exp to differentiate
        lengths = case.offsets.diff()[case.context_index.long()]
        grad_lse[lengths == 0] = 0
    before = [launch_counts[name] for name in BACKWARD_KERNELS]
    results = gradients(case, cross_attention_with_lse, grad_output, grad_lse)
    assert all(launch_counts[name] > count for name, count in zip(BACKWARD_KERNELS, before, strict=True))
    expected = gradients(case, cross_attention_reference, grad_output, grad_lse, torch.float64)
    for result, reference in zip(results, expected, strict=True):
        reference = torch.zeros_like(result) if reference is None else reference
        assert relative_error(result, reference) < TOLERANCES[case.query.dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("lengths", "rows", "query_len", "heads", "head_dim"),
    [
        ([65, 0, 3, 20], [2, 0, 0, 1, 0], 7, (6, 2), 48),
        ([1, 70], [1, 0], 35, (2, 2), 32),
        ([40], [0, 0, 0], 1, (9, 3), 64),
        ([9, 20], [1, 0], 3, (2, 1), 200),
    ],
    ids=["shared", "tiny", "decode", "wide"],
)
def test_gradients(lengths, rows, query_len, heads, head_dim, dtype):
    check(random_case(lengths, rows, query_len, *heads, head_dim, dtype), with_lse=query_len == 7)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 128, 256])
def test_gradients_of_long_contexts(head_dim):
    check(random_case([2049, 31], [0, 1, 0], 65, 4, 2, head_dim, torch.bfloat16))


def test_tokens_that_no_row_attends_to_get_zeros():
    case = random_case([5, 33, 70], [1, 1], 3)
    leaves = [tensor.requires_grad_() for tensor in case.arguments[:3]]
    cross_attention(*leaves, case.offsets, case.context_index).sum().backward()
    for leaf in leaves[1:]:
        assert (leaf.grad[:5] == 0).all()
        assert (leaf.grad[38:] == 0).all()
        assert leaf.grad[5:38].abs().min() > 0


def test_backward_is_deterministic_and_order_of_rows_is_irrelevant_to_queries():
    case = random_case([50, 20], [0, 1, 0, 0], 5)
    grad = torch.randn(case.query.shape)
    first = gradients(case, cross_attention_with_lse, grad, None)
    second = gradients(case, cross_attention_with_lse, grad, None)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    flipped = Case(case.query.flip(0), case.key, case.value, case.offsets, case.context_index.flip(0))
    other = gradients(flipped, cross_attention_with_lse, grad.flip(0), None)
    # the interpreter's BLAS may sum flipped rows in another order
    assert relative_error(other[0].flip(0), first[0]) < TOLERANCES[torch.float32]


def test_strided_and_expanded_gradients():
    case = random_case([30, 9], [0, 1], 4)
    whole = gradients(case, cross_attention_with_lse, torch.ones(case.query.shape), None)
    expanded = gradients(case, cross_attention_with_lse, torch.ones(()).expand(case.query.shape), None)
    assert all(torch.equal(one, other) for one, other in zip(whole, expanded, strict=True))


def test_gradients_of_addresses_beyond_32_bits():
    # nothing may fill what is far apart
    torch.use_deterministic_algorithms(False)
    case = random_case([9], [0], 5, 3, 1, 16)
    storage = torch.empty(2 * (2**30 + 16) + 5 * 16)
    query = storage.as_strided(case.query.shape, (0, 16, 2**30 + 16, 1)).copy_(case.query)
    grad = torch.ones(case.query.shape)
    leaves = [tensor.requires_grad_() for tensor in (query, case.key, case.value)]
    output, _ = cross_attention_with_lse(*leaves, case.offsets, case.context_index)
    results = torch.autograd.grad(output, leaves, grad)
    expected = gradients(case, cross_attention_with_lse, grad, None)
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_unchecked_offsets_stay_within_the_tensors():
    """A CUDA graph replays whatever its offsets hold: the kernels clamp them, tiles before a context do nothing."""
    case = random_case([70], [1], 3)
    offsets = torch.tensor([0, -(2**31), 2**32])
    output, lse = torch.zeros_like(case.query), torch.zeros(1, 4, 3)
    around = torch.zeros(3, *case.key.shape)
    found = (torch.zeros_like(case.query), around[1], torch.zeros_like(case.value))
    launches = plan_backward(
        case.query, None, *case.arguments[:3], offsets, case.context_index, output, lse, 0.1, found
    )
    for launch in launches:
        launch.run()
    assert (around[[0, 2]] == 0).all()


def test_frozen_context_skips_its_kernel():
    case = random_case([30, 9], [0, 1], 4)
    before = launch_counts["context_gradient_kernel"]
    cross_attention(case.query.requires_grad_(), *case.arguments[1:]).sum().backward()
    assert case.query.grad is not None
    assert launch_counts["context_gradient_kernel"] == before


def test_quantized_context_has_no_gradient():
    case = random_case([30], [0], bits=8)
    output = cross_attention(case.query.requires_grad_(), *case.arguments[1:], **case.quantization)
    with pytest.raises(ValueError, match="dequantize"):
        output.sum().backward()


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    query_len=st.sampled_from([1, 3, 17]),
    heads=st.sampled_from([(1, 1), (6, 2), (3, 1)]),
    head_dim=st.sampled_from([16, 40]),
    data=st.data(),
)
def test_any_shape(lengths, query_len, heads, head_dim, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
    check(random_case(lengths, rows, query_len, *heads, head_dim))


@pytest.mark.parametrize("bits", [0, 8], ids=["plain", "int8"])
def test_opcheck_attention(bits):
    case = random_case([20, 0, 5], [0, 1, 2, 0], 2, 2, 1, 16, bits=bits)
    leaves = [case.query, case.key, case.value]
    if bits == 0:
        leaves = [leaf.requires_grad_() for leaf in leaves]
    torch.library.opcheck(cross_attention_op, (*leaves, *case.arguments[3:], 0.25, *Quantization(**case.quantization)))


def test_opcheck_backward():
    case = random_case([20, 5], [0, 1, 0], 2, 2, 1, 16)
    output, lse = cross_attention_with_lse(*case.arguments)
    inputs = (torch.ones_like(output), torch.ones_like(lse), *case.arguments, output, lse, 0.25, True)
    torch.library.opcheck(cross_attention_backward_op, inputs)


def test_opcheck_projection():
    states, scale, _ = random_quantized(5, 2, 64, 8)
    weight, norm_weight = torch.randn(24, 128), torch.ones(128)
    torch.library.opcheck(project_quantized_op, (states, scale, None, weight, None, norm_weight, 1e-5))


@pytest.mark.parametrize("query_len", [1, 40], ids=["decode", "forward"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(backend, query_len):
    torch.use_deterministic_algorithms(False)
    case = random_case([20, 30], [0, 1, 0], query_len)
    counts = launch_counts.copy()

    def attend(query, key, value, offsets, index):
        return cross_attention(query, key, value, offsets, index).sum(1)

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    leaves = [tensor.clone().requires_grad_() for tensor in case.arguments[:3]]
    result = compiled(*leaves, *case.arguments[3:])
    result.square().sum().backward()
    expected = [tensor.clone().requires_grad_() for tensor in case.arguments[:3]]
    eager = attend(*expected, *case.arguments[3:])
    eager.square().sum().backward()
    # a compiled sum may take another order
    torch.testing.assert_close(result, eager)
    for one, other in zip(leaves, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert launch_counts["query_gradient_kernel"] == counts["query_gradient_kernel"] + 2


def test_compile_projection():
    torch.use_deterministic_algorithms(False)
    states, scale, _ = random_quantized(5, 2, 64, 8)
    weight = torch.randn(24, 128)
    compiled = torch.compile(project_quantized, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(states, scale, None, weight), project_quantized(states, scale, None, weight))
