"""Time the kernels on a GPU against SDPA, flex_attention and FlashAttention's varlen form (where installed).

    python kernels/benchmarks/benchmark.py --output results/kernels_benchmark.json
    python kernels/benchmarks/benchmark.py --tune --output /tmp/tuned.json      # every candidate configuration

Each case is first compared with the float32 result of SDPA; the time is the median over repeated runs with a cold L2.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from provenance import provenance, write_json
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from traffic import Shape
from triton.testing import do_bench
from xcllama_kernels import cross_attention, project_quantized, quantize_int8
from xcllama_kernels.cases import Case, random_case, relative_error
from xcllama_kernels.configs import decode_configs, decode_rows, forward_configs
from xcllama_kernels.decode import plan_decode, rows_a_tile
from xcllama_kernels.forward import plan_forward
from xcllama_kernels.launch import INTERPRETED, Quantization, target_of

# (batch, contexts, context length, query length, heads, KV heads, head size)
SHAPES = {
    "decode": [Shape(1, 1, 8192, 1, 32, 8, 128), Shape(8, 8, 8192, 1, 32, 8, 128), Shape(64, 64, 2048, 1, 32, 8, 128)],
    "decode, shared context": [Shape(32, 1, 8192, 1, 32, 8, 128), Shape(16, 4, 4096, 1, 9, 3, 64)],
    "prefill": [Shape(4, 4, 4096, 512, 32, 8, 128), Shape(8, 8, 1024, 256, 9, 3, 64)],
    "training": [Shape(8, 8, 1024, 512, 32, 8, 128), Shape(16, 16, 512, 256, 9, 3, 64)],
}


def make_case(shape: Shape, dtype: torch.dtype, bits: int) -> Case:
    rows = [row % shape.contexts for row in range(shape.batch)]
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    return random_case([shape.context_len] * shape.contexts, rows, shape.query_len, *heads, dtype, bits, "cuda")


def padded(case: Case, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as `[batch, heads, length, head_dim]`, one context a row (copied where rows share one)."""
    states = [tensor.unflatten(0, (shape.contexts, shape.context_len)) for tensor in (case.key, case.value)]
    key, value = (tensor[case.context_index.long()].transpose(1, 2).contiguous() for tensor in states)
    return case.query.transpose(1, 2).contiguous(), key, value


def flash_varlen(case: Case, shape: Shape) -> Callable[[], Tensor] | None:
    """FlashAttention's packed form, where it is installed; rows that share a context get a copy of it."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    _, key, value = padded(case, shape)
    key, value = (tensor.transpose(1, 2).flatten(0, 1).contiguous() for tensor in (key, value))
    lengths = [
        torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * step
        for step in (shape.query_len, shape.context_len)
    ]
    query = case.query.flatten(0, 1)
    return lambda: flash_attn_varlen_func(query, key, value, *lengths, shape.query_len, shape.context_len)


def competitors(case: Case, shape: Shape) -> dict[str, Callable[[], Tensor]]:
    """Name -> one attention call on the same numbers."""
    query, key, value = padded(case, shape)
    compiled = torch.compile(flex_attention)
    calls = {
        "sdpa": lambda: scaled_dot_product_attention(query, key, value, enable_gqa=True),
        "flex_attention": lambda: compiled(query, key, value, enable_gqa=True),
    }
    if flash := flash_varlen(case, shape):
        calls["flash_attention"] = flash
    return calls


def microseconds(call: Callable[[], object]) -> float:
    return round(1000 * do_bench(call, return_mode="median"), 2)


def with_backward(call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    def run() -> object:
        output = call()
        return torch.autograd.grad(output, leaves, torch.ones_like(output))

    return run


def time_case(kind: str, shape: Shape) -> dict[str, object]:
    """Error and times of one shape in bf16, and of ours with int8 and int4 contexts."""
    case = make_case(shape, torch.bfloat16, 0)
    calls = {"ours": lambda: cross_attention(*case.arguments)} | competitors(case, shape)
    query, key, value = (tensor.float() for tensor in padded(case, shape))
    expected = scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2)
    record: dict[str, object] = {
        "kind": kind,
        "shape": vars(shape),
        "error": relative_error(calls["ours"](), expected),
    }
    if kind == "training":
        leaves = [tensor.requires_grad_() for tensor in case.arguments[:3]]
        record["us"] = {"ours": microseconds(with_backward(calls["ours"], leaves))}
        query, key, value = (tensor.detach().requires_grad_() for tensor in padded(case, shape))
        sdpa = with_backward(
            lambda: scaled_dot_product_attention(query, key, value, enable_gqa=True), [query, key, value]
        )
        record["us"]["sdpa"] = microseconds(sdpa)
        return record
    record["us"] = {name: microseconds(call) for name, call in calls.items()}
    for bits in (8, 4):
        quantized = make_case(shape, torch.bfloat16, bits)
        attend = lambda quantized=quantized: cross_attention(*quantized.arguments, **quantized.quantization)  # noqa: E731
        record["us"][f"ours, int{bits}"] = microseconds(attend)
    return record


def time_projection() -> dict[str, object]:
    """Projection of int8 states against dequantizing first."""
    states = torch.randn(8192, 64, 64, device="cuda")
    data, scale = quantize_int8(states)
    weight = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16) / 64

    def dequantize_first() -> Tensor:
        return torch.nn.functional.linear((data * scale[..., None]).to(torch.bfloat16).flatten(1), weight)

    error = relative_error(project_quantized(data, scale, None, weight), dequantize_first())
    times = {
        "ours": microseconds(lambda: project_quantized(data, scale, None, weight)),
        "dequantize, then linear": microseconds(dequantize_first),
    }
    return {
        "kind": "projection",
        "shape": {"num_tokens": 8192, "width": 4096, "columns": 2048},
        "error": error,
        "us": times,
    }


def tune_case(kind: str, shape: Shape, bits: int) -> list[dict[str, object]]:
    """The time of each candidate configuration of decode or forward."""
    case = make_case(shape, torch.bfloat16, bits)
    quantization = Quantization(**case.quantization)
    target = target_of(case.query.device)
    group = shape.num_heads // shape.num_kv_heads
    most = decode_rows(torch.bfloat16, shape.head_dim)
    if kind.startswith("decode"):
        block_m = rows_a_tile(shape.batch, shape.contexts, shape.query_len, group, most)
        plan, candidates = plan_decode, decode_configs(target, torch.bfloat16, shape.head_dim, bits, block_m)
    else:
        plan, candidates = plan_forward, forward_configs(target, torch.bfloat16, shape.head_dim, bits)
    output = torch.empty_like(case.query)
    lse = torch.empty(shape.batch, shape.num_heads, shape.query_len, device="cuda")
    records = []
    for config in candidates:
        launches = plan(
            *case.arguments[:3], quantization, *case.arguments[3:], output, lse, shape.head_dim**-0.5, config=config
        )
        time = microseconds(lambda launches=launches: [launch.run() for launch in launches])
        records.append({"kind": kind, "shape": vars(shape), "bits": bits, "config": vars(config), "us": time})
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tune", action="store_true", help="time every candidate configuration instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or INTERPRETED:
        raise ValueError("the benchmark needs a GPU and no TRITON_INTERPRET; inspect_kernels.py needs neither.")
    if arguments.tune:
        kinds = [kind for kind in SHAPES if kind != "training"]
        records = [
            record
            for kind in kinds
            for shape in SHAPES[kind]
            for bits in (0, 8, 4)
            for record in tune_case(kind, shape, bits)
        ]
    else:
        records = [time_case(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes] + [time_projection()]
    for record in records:
        print(record)
    run = provenance(Path(__file__), torch.cuda.get_device_name())
    write_json(arguments.output, run | {"seed": 0, "records": records})
    return 0


if __name__ == "__main__":
    sys.exit(main())
