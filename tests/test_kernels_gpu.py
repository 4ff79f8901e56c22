"""The kernels on a real GPU: `TRITON_INTERPRET=0 pytest -m gpu tests/test_kernels_gpu.py`."""

import pytest
import torch
from xcllama_kernels import cross_attention, cross_attention_with_lse, project_quantized
from xcllama_kernels.cases import Case, random_case, random_quantized, relative_error
from xcllama_kernels.launch import INTERPRETED, launch_counts
from xcllama_kernels.reference import cross_attention_reference, project_quantized_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 runs the kernels on the CPU"),
]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bits", [0, 8, 4], ids=["plain", "int8", "int4"])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("query_len", [1, 200], ids=["decode", "forward"])
def test_attention(query_len, head_dim, bits, dtype):
    case = random_case([1000, 0, 8192, 1], [2, 0, 1, 2, 3, 2], query_len, 8, 2, head_dim, dtype, bits, "cuda")
    output, lse = cross_attention_with_lse(*case.arguments, **case.quantization)
    expected, expected_lse = cross_attention_reference(*case.arguments, **case.quantization)
    assert relative_error(output, expected) < TOLERANCES[dtype]
    finite = expected_lse.isfinite()
    assert relative_error(lse[finite], expected_lse[finite]) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gradients_and_determinism(head_dim, dtype):
    case = random_case([700, 0, 64], [0, 2, 0, 1], 130, 6, 2, head_dim, dtype, 0, "cuda")
    grad = torch.randn_like(case.query)
    leaves = [tensor.requires_grad_() for tensor in case.arguments[:3]]
    runs = [torch.autograd.grad(cross_attention(*leaves, *case.arguments[3:]), leaves, grad) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(cross_attention_reference(*exact, *case.arguments[3:])[0], exact, grad.double())
    for result, reference in zip(runs[0], expected, strict=True):
        assert relative_error(result, reference) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bits", [8, 4])
def test_projection(bits, dtype):
    states = [None if part is None else part.cuda() for part in random_quantized(700, 9, 64, bits)]
    weight = (torch.randn(192, 576, device="cuda") / 24).to(dtype)
    options = {"norm_weight": torch.ones(576, device="cuda", dtype=dtype), "norm_eps": 1e-5}
    expected = project_quantized_reference(*states, weight, **options)
    assert relative_error(project_quantized(*states, weight, **options), expected) < TOLERANCES[dtype]


def test_compile_and_cuda_graph():
    case = random_case([500, 300], [1, 0, 1], 1, 8, 2, 64, torch.bfloat16, 0, "cuda")
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


@pytest.mark.parametrize("query_len", [1, 70], ids=["decode", "forward"])
def test_addresses_beyond_32_bits(query_len):
    case = random_case([2], [0], query_len, 3, 1, 64, torch.float16, 8, "cuda")
    expected = cross_attention(*case.arguments, **case.quantization)
    storage = torch.empty(2**31 + 16 + 64, dtype=torch.int8, device="cuda")
    key = storage.as_strided((2, 1, 64), (2**31 + 16, 64, 1)).copy_(case.key)
    storage = torch.empty(2 * (2**30 + 16) + 64 * query_len, dtype=torch.float16, device="cuda")
    query = storage.as_strided((1, query_len, 3, 64), (0, 64, 2**30 + 16, 1)).copy_(case.query)
    moved = Case(query, key, case.value, case.offsets, case.context_index, case.quantization)
    assert torch.equal(cross_attention(*moved.arguments, **moved.quantization), expected)


def test_bad_indices_in_a_cuda_graph_stay_within_the_tensors():
    """Nothing can be read back during a replay: the kernels clamp offsets and indices."""
    case = random_case([500, 300], [1, 0, 1], 1, 8, 2, 64, torch.bfloat16, 0, "cuda")
    cross_attention(*case.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = cross_attention(*case.arguments)
    case.context_index.copy_(torch.tensor([-1, 2**30, 1]))
    case.offsets.copy_(torch.tensor([700, -(2**31), 2**31 - 1]))
    graph.replay()
    torch.cuda.synchronize()
    assert output.isfinite().all()


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_generate_equals_sdpa(dtype, tiny_base, make_model, batch):
    fields = {"cross_attention_head_dim": 16, "cross_attention_layers": [1, 3], "init": "random"}
    model = make_model(tiny_base, **fields, cross_attn_implementation="triton").to("cuda")
    inputs = {name: tensor.to("cuda") for name, tensor in batch.items()}
    cache = model.encode_context(inputs["context_input_ids"], inputs["context_attention_mask"]).join([[0], [1, 0]])
    cache = cache if dtype is None else cache.quantize(dtype)
    generated = {}
    for name in ("auto", "triton", "sdpa"):
        model.config.cross_attn_implementation = name
        before = launch_counts["decode_kernel"]
        generated[name] = model.generate(
            inputs["input_ids"], context_cache=cache, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        assert (launch_counts["decode_kernel"] > before) == (name != "sdpa")
    assert torch.equal(generated["triton"], generated["sdpa"])
    assert torch.equal(generated["triton"], generated["auto"])
