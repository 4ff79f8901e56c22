"""The kernels on a real GPU (`make gpu-check`); without one, on small sizes, in Triton's interpreter."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from xcllama_kernels import cross_attention, cross_attention_with_lse, project_quantized  # noqa: E402
from xcllama_kernels.cases import Case, random_case, random_quantized, relative_error  # noqa: E402
from xcllama_kernels.launch import INTERPRETED, launch_counts  # noqa: E402
from xcllama_kernels.reference import cross_attention_reference, project_quantized_reference  # noqa: E402

from modeling_xcllama import XCLlamaForCausalLM  # noqa: E402
from modeling_xcllama.cross_attention import ContextRows, attend_with_lse  # noqa: E402
from modeling_xcllama.joint_attention import ContextReader, JointReading  # noqa: E402

ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU and not INTERPRETED, reason="no GPU, and triton was imported to compile"),
]
NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="no GPU")
# relative error against float64: products of float32 are exact, those of 16 bits are not
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES) if ON_GPU else [torch.bfloat16], ids=NAMES.get)
HEAD_DIMS = [16, 64, 128, 256] if ON_GPU else [64]


@contextmanager
def poisoned() -> Iterator[None]:
    """Every torch.empty holds NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1, device=DEVICE).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@DTYPES
@pytest.mark.parametrize("bits", [0, 8, 4], ids=["plain", "int8", "int4"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("query_len", [1, 200 if ON_GPU else 40], ids=["decode", "forward"])
def test_attention(query_len, head_dim, bits, dtype, record_property):
    lengths = [1000, 0, 8192, 1] if ON_GPU else [20, 0, 70, 1]
    case = random_case(lengths, [2, 0, 1, 2, 3, 2], query_len, 8, 2, head_dim, dtype, bits, DEVICE)
    kernel = "decode_kernel" if query_len == 1 else "forward_kernel"
    before = launch_counts[kernel]
    with poisoned():
        output, lse = cross_attention_with_lse(*case.arguments, **case.quantization)
    assert launch_counts[kernel] == before + 1
    expected, expected_lse = cross_attention_reference(*case.arguments, **case.quantization)
    record_property("relative_error", relative_error(output, expected))
    assert relative_error(output, expected) < TOLERANCES[dtype]
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert relative_error(lse[finite], expected_lse[finite]) < TOLERANCES[dtype]


@DTYPES
@pytest.mark.parametrize("head_dim", [dim for dim in HEAD_DIMS if dim > 16])
def test_gradients_are_right_and_the_same_every_time(head_dim, dtype, record_property):
    lengths, query_len = ([700, 0, 64], 130) if ON_GPU else ([40, 0, 9], 10)
    case = random_case(lengths, [0, 2, 0, 1], query_len, 6, 2, head_dim, dtype, 0, DEVICE)
    grad = torch.randn_like(case.query)
    leaves = [tensor.requires_grad_() for tensor in case.arguments[:3]]
    with poisoned():
        runs = [torch.autograd.grad(cross_attention(*leaves, *case.arguments[3:]), leaves, grad) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(cross_attention_reference(*exact, *case.arguments[3:])[0], exact, grad.double())
    errors = [relative_error(result, reference) for result, reference in zip(runs[0], expected, strict=True)]
    record_property("relative_error", max(errors))
    assert max(errors) < TOLERANCES[dtype]


def read_jointly(
    query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, rows: ContextRows
) -> Tensor:
    """One layer's joint reading: a row's own tokens by products, its context by the kernels."""
    scale = query.shape[-1] ** -0.5
    grouped = query.transpose(1, 2).unflatten(1, (key.shape[1], -1))
    own = attend_with_lse(grouped, *(part.transpose(1, 2).unsqueeze(2) for part in (own_key, own_value)), scale, None)
    own = [part.flatten(1, 2).transpose(1, 2) for part in own]
    reads = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
    reading = JointReading(key, value, rows, reads, None, None, "triton", output_weights=False)
    return ContextReader()(query, *own, reading, scale)[0]


def read_in_one_softmax(
    query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, rows: ContextRows
) -> Tensor:
    """The same over the tokens of both, side by side."""
    outputs = []
    for row, context in enumerate(rows.context_index):
        read = slice(rows.offsets[context], rows.offsets[context + 1])
        keys, values = torch.cat([key[read], own_key[row]]), torch.cat([value[read], own_value[row]])
        group = query.shape[2] // keys.shape[1]
        parts = [part.transpose(0, 1).repeat_interleave(group, 0) for part in (keys, values)]
        outputs.append(scaled_dot_product_attention(query[row].transpose(0, 1), *parts).transpose(0, 1))
    return torch.stack(outputs)


@DTYPES
@pytest.mark.parametrize("query_len", [1, 200 if ON_GPU else 10], ids=["decode", "forward"])
def test_context_and_own_tokens_merge_to_one_softmax(query_len, dtype, record_property):
    lengths = [1000, 0, 300] if ON_GPU else [40, 0, 9]
    case = random_case(lengths, [2, 0, 1, 0], query_len, 6, 2, 64, dtype, 0, DEVICE)
    rows = ContextRows(tuple(case.offsets.tolist()), tuple(case.context_index.tolist()))
    own = torch.randn(2, 4, 7, 2, 64, device=DEVICE).to(dtype)
    leaves = [part.requires_grad_() for part in (*case.arguments[:3], *own)]
    before = launch_counts.total()
    with poisoned():
        merged = read_jointly(*leaves, rows)
        grad = torch.randn_like(merged)
        gradients = torch.autograd.grad(merged, leaves, grad)
    assert launch_counts.total() >= before + 3
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = read_in_one_softmax(*exact, rows)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    errors = [relative_error(*pair) for pair in zip((merged, *gradients), (expected, *wanted), strict=True)]
    record_property("relative_error", max(errors))
    assert max(errors) < TOLERANCES[dtype]


@DTYPES
@pytest.mark.parametrize("bits", [8, 4])
def test_projection(bits, dtype, record_property):
    states = random_quantized(700 if ON_GPU else 40, 9, 64, bits, device=DEVICE)
    weight = (torch.randn(192 if ON_GPU else 40, 576, device=DEVICE) / 24).to(dtype)
    options = {"norm_weight": torch.ones(576, device=DEVICE, dtype=dtype), "norm_eps": 1e-5}
    expected = project_quantized_reference(*states, weight, **options)
    with poisoned():
        error = relative_error(project_quantized(*states, weight, **options), expected)
    record_property("relative_error", error)
    assert error < TOLERANCES[dtype]


@NEEDS_GPU
def test_compile_and_cuda_graph():
    case = random_case([500, 300], [1, 0, 1], 1, 8, 2, 64, torch.bfloat16, 0, DEVICE)
    expected = cross_attention(*case.arguments)
    compiled = torch.compile(cross_attention, fullgraph=True)
    assert torch.equal(compiled(*case.arguments), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = cross_attention(*case.arguments)
    case.query.zero_()
    graph.replay()
    assert torch.equal(output, cross_attention(*case.arguments))
    assert not torch.equal(output, expected)


@NEEDS_GPU
@pytest.mark.parametrize("query_len", [1, 70], ids=["decode", "forward"])
def test_addresses_beyond_32_bits(query_len):
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("less than 8 GiB of the GPU's memory are free")
    case = random_case([2], [0], query_len, 3, 1, 64, torch.float16, 8, DEVICE)
    expected = cross_attention(*case.arguments, **case.quantization)
    storage = torch.empty(2**31 + 16 + 64, dtype=torch.int8, device=DEVICE)
    key = storage.as_strided((2, 1, 64), (2**31 + 16, 64, 1)).copy_(case.key)
    storage = torch.empty(2 * (2**30 + 16) + 64 * query_len, dtype=torch.float16, device=DEVICE)
    query = storage.as_strided((1, query_len, 3, 64), (0, 64, 2**30 + 16, 1)).copy_(case.query)
    moved = Case(query, key, case.value, case.offsets, case.context_index, case.quantization)
    assert torch.equal(cross_attention(*moved.arguments, **moved.quantization), expected)


@NEEDS_GPU
def test_bad_indices_in_a_cuda_graph_stay_within_the_tensors():
    """Nothing can be read back during a replay: the kernels clamp offsets and indices."""
    case = random_case([500, 300], [1, 0, 1], 1, 8, 2, 64, torch.bfloat16, 0, DEVICE)
    cross_attention(*case.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = cross_attention(*case.arguments)
    case.context_index.copy_(torch.tensor([-1, 2**30, 1]))
    case.offsets.copy_(torch.tensor([700, -(2**31), 2**31 - 1]))
    graph.replay()
    torch.cuda.synchronize()
    assert output.isfinite().all()


@pytest.mark.parametrize("mode", ["block", "joint"] if ON_GPU else ["joint"])
@pytest.mark.parametrize("dtype", [None, "int8", "int4"], ids=["bf16", "int8", "int4"])
def test_generate_equals_sdpa(dtype, mode):
    """A random model in float32: the kernels, which "auto" takes on a GPU, give the tokens of SDPA."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=2, tie_word_embeddings=True, **sizes))
    fields = {"cross_attention_layers": [1, 3], "cross_attention_mode": mode, "init": "random"}
    model = XCLlamaForCausalLM.from_decoder(base, **fields).eval().to(DEVICE)
    with torch.no_grad():
        for _, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)
    contexts, question = torch.randint(3, 97, (2, 11), device=DEVICE), torch.randint(3, 97, (2, 7), device=DEVICE)
    cache = model.encode_context(contexts).join([[0], [1, 0]])
    cache = cache if dtype is None else cache.quantize(dtype)
    generated = {}
    for name in ("auto", "triton", "sdpa"):
        model.config.cross_attn_implementation = name
        before = launch_counts["decode_kernel"]
        generated[name] = model.generate(
            question, context_cache=cache, max_new_tokens=6 if ON_GPU else 2, do_sample=False, eos_token_id=None
        )
        assert (launch_counts["decode_kernel"] > before) == (name == "triton" or (name == "auto" and ON_GPU))
    assert all(torch.equal(tokens, generated["sdpa"]) for tokens in generated.values())
