"""Time the kernels on a GPU against SDPA, flex_attention and FlashAttention's varlen form (where installed).

    python kernels/benchmarks/benchmark.py --output results/kernels_benchmark.json
    python kernels/benchmarks/benchmark.py --tune --output /tmp/tuned.json      # every candidate configuration

Each result is first compared with the float32 reference; times are the median over repeated runs with a cold L2. What
cannot run stands in the results with its error. Fails when one of our kernels cannot run or is wrong.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import linear, scaled_dot_product_attention
from traffic import Shape
from triton.testing import do_bench
from xcllama_kernels import (
    configs,
    cross_attention,
    cross_attention_with_lse,
    project_quantized,
)
from xcllama_kernels.backward import plan_backward
from xcllama_kernels.cases import Case, random_case, random_quantized, relative_error
from xcllama_kernels.decode import plan_decode, rows_a_tile
from xcllama_kernels.forward import plan_forward
from xcllama_kernels.launch import INTERPRETED, Launch, Quantization, target_of
from xcllama_kernels.project import plan_projection
from xcllama_kernels.reference import cross_attention_reference, dequantize

from xcllama.provenance import require_clean, write_result

# (batch, contexts, context length, query length, heads, KV heads, head size)
SHAPES = {
    "decode": [Shape(1, 1, 8192, 1, 32, 8, 128), Shape(8, 8, 8192, 1, 32, 8, 128), Shape(64, 64, 2048, 1, 32, 8, 128)],
    "decode, shared context": [Shape(32, 1, 8192, 1, 32, 8, 128), Shape(16, 4, 4096, 1, 9, 3, 64)],
    "prefill": [Shape(4, 4, 4096, 512, 32, 8, 128), Shape(8, 8, 1024, 256, 9, 3, 64)],
    "training": [Shape(8, 8, 1024, 512, 32, 8, 128), Shape(16, 16, 512, 256, 9, 3, 64)],
}
# (tokens, heads of 64 channels, columns)
PROJECTIONS = [(8192, 64, 2048), (8192, 9, 384)]
TOLERANCE = 1e-2

# a function and the tensors it takes, which have gradients in training
Call = tuple[Callable[..., Tensor], list[Tensor]]


def make_case(shape: Shape, bits: int, device: str) -> Case:
    rows = [row % shape.contexts for row in range(shape.batch)]
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    lengths = [shape.context_len] * shape.contexts
    return random_case(lengths, rows, shape.query_len, *heads, torch.bfloat16, bits, device)


def ours(case: Case) -> Call:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return cross_attention(query, key, value, case.offsets, case.context_index, **case.quantization)

    return attend, list(case.arguments[:3])


def competitors(case: Case, shape: Shape) -> dict[str, Call]:
    """Name -> a call on the same numbers, its output like ours; rows that share a context get a copy of it."""
    states = [tensor.unflatten(0, (shape.contexts, shape.context_len)) for tensor in (case.key, case.value)]
    rows = [case.query, *(tensor[case.context_index.long()] for tensor in states)]
    by_head = [tensor.transpose(1, 2).contiguous() for tensor in rows]
    # shapes that become dynamic are slower, and after eight of them nothing is compiled any more
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    calls: dict[str, Call] = {
        "sdpa": (lambda *inputs: scaled_dot_product_attention(*inputs, enable_gqa=True).transpose(1, 2), by_head),
        "flex_attention": (lambda *inputs: compiled(*inputs, enable_gqa=True).transpose(1, 2), by_head),
    }
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        lengths = (shape.query_len, shape.context_len)
        steps = torch.arange(shape.batch + 1, dtype=torch.int32, device=case.query.device)
        bounds = [steps * length for length in lengths]

        def flash(*inputs: Tensor) -> Tensor:
            return flash_attn_varlen_func(*inputs, *bounds, *lengths).unflatten(0, (shape.batch, shape.query_len))

        calls["flash_attention"] = flash, [tensor.flatten(0, 1).contiguous() for tensor in rows]
    return calls


def microseconds(call: Callable[[], object]) -> float:
    return round(1000 * do_bench(call, return_mode="median"), 2)


def reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).splitlines()[:1]}"


def compare(call: Call, expected: Tensor, training: bool) -> dict[str, object]:
    """Error and time of a call, forward and backward in training; or why it failed."""
    function, inputs = call
    leaves = [tensor.detach().requires_grad_(training) for tensor in inputs]

    def run() -> object:
        output = function(*leaves)
        return torch.autograd.grad(output, leaves, torch.ones_like(output)) if training else output

    try:
        error = relative_error(function(*leaves).detach(), expected)
        return {"error": error, "us": microseconds(run)}
    except Exception as failure:
        return {"failed": reason(failure)}


def time_case(kind: str, shape: Shape, bits: int, device: str) -> dict[str, object]:
    """Ours in bf16 or on a quantized context, and the others in bf16."""
    case = make_case(shape, bits, device)
    expected, _ = cross_attention_reference(*case.arguments, **case.quantization, dtype=torch.float32)
    calls = {"ours": ours(case)} | ({} if bits else competitors(case, shape))
    found = {name: compare(call, expected, kind == "training") for name, call in calls.items()}
    return {"kind": kind, "shape": vars(shape), "bits": bits} | found


def projection_inputs(num_tokens: int, heads: int, columns: int, bits: int, device: str) -> list[Tensor | None]:
    """Quantized states, scale, zero and a bf16 weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(columns, 64 * heads, generator=generator).to(device, torch.bfloat16) / (64 * heads) ** 0.5
    quantized = random_quantized(num_tokens, heads, 64, bits, generator)
    return [*(None if part is None else part.to(device) for part in quantized), weight]


def time_projection(num_tokens: int, heads: int, columns: int, bits: int, device: str) -> dict[str, object]:
    """Projection of quantized states against dequantizing first."""
    data, scale, zero, weight = projection_inputs(num_tokens, heads, columns, bits, device)
    expected = linear(dequantize(data, scale, zero, torch.float32).flatten(1), weight.float())
    calls: dict[str, Call] = {
        "ours": (lambda *inputs: project_quantized(*inputs[:2], zero, inputs[2]), [data, scale, weight]),
        "dequantize, then linear": (
            lambda *inputs: linear(dequantize(*inputs[:2], zero, weight.dtype).flatten(1), inputs[2]),
            [data, scale, weight],
        ),
    }
    shape = {"num_tokens": num_tokens, "width": 64 * heads, "columns": columns}
    found = {name: compare(call, expected, False) for name, call in calls.items()}
    return {"kind": "projection", "shape": shape, "bits": bits} | found


def attention_candidates(kind: str, shape: Shape, bits: int, device: str) -> Iterator[list[Launch]]:
    """The launches of each candidate configuration for a shape."""
    case = make_case(shape, bits, device)
    dtype, head_dim, target = case.query.dtype, shape.head_dim, target_of(case.query.device)
    output, lse = cross_attention_with_lse(*case.arguments, **case.quantization)
    scale = head_dim**-0.5
    if kind == "training":
        gradients = tuple(torch.empty_like(tensor) for tensor in case.arguments[:3])
        arguments = (torch.ones_like(output), None, *case.arguments, output, lse, scale, gradients)
        by_query = configs.query_gradient_configs(target, dtype, head_dim)
        by_context = configs.context_gradient_configs(target, dtype, head_dim)
        for config in by_query:
            yield plan_backward(*arguments, configs=(config, by_context[0]))[:1]
        for config in by_context:
            yield plan_backward(*arguments, configs=(by_query[0], config))[1:]
        return
    if kind == "prefill":
        plan, candidates = plan_forward, configs.forward_configs(target, dtype, head_dim, bits)
    else:
        group = shape.num_heads // shape.num_kv_heads
        most = configs.decode_rows(dtype, head_dim)
        block_m = rows_a_tile(shape.batch, shape.contexts, shape.query_len, group, most)
        plan, candidates = plan_decode, configs.decode_configs(target, dtype, head_dim, bits, block_m)
    inputs = (*case.arguments[:3], Quantization(**case.quantization), *case.arguments[3:], output, lse, scale)
    for config in candidates:
        yield plan(*inputs, config=config)


def projection_candidates(num_tokens: int, heads: int, columns: int, bits: int, device: str) -> Iterator[list[Launch]]:
    data, scale, zero, weight = projection_inputs(num_tokens, heads, columns, bits, device)
    output = torch.empty(num_tokens, columns, dtype=weight.dtype, device=device)
    for config in configs.projection_configs(target_of(data.device), weight.dtype, bits):
        yield plan_projection(data, scale, zero, weight, None, None, None, output, config=config)


def tune(kind: str, shape: object, bits: int, candidates: Iterator[list[Launch]]) -> Iterator[dict[str, object]]:
    """The time of each candidate."""
    for launches in candidates:
        record = {"kind": kind, "kernel": launches[0].name, "shape": shape, "bits": bits}
        record["config"] = vars(launches[0].config)
        try:
            record["us"] = microseconds(lambda launches=launches: [launch.run() for launch in launches])
        except Exception as failure:
            record["failed"] = reason(failure)
        yield record


def all_records(tuning: bool, device: str) -> Iterator[dict[str, object]]:
    for kind, shapes in SHAPES.items():
        for shape in shapes:
            for bits in (0,) if kind == "training" else (0, 8, 4):
                if tuning:
                    yield from tune(kind, vars(shape), bits, attention_candidates(kind, shape, bits, device))
                else:
                    yield time_case(kind, shape, bits, device)
    for sizes in PROJECTIONS:
        for bits in (8, 4):
            if tuning:
                yield from tune("projection", sizes, bits, projection_candidates(*sizes, bits, device))
            else:
                yield time_projection(*sizes, bits, device)


def is_wrong(record: dict) -> bool:
    """Whether one of our kernels failed or missed the reference."""
    result = record.get("ours", record)
    return "failed" in result or not result.get("error", 0.0) < TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tune", action="store_true", help="time every candidate configuration instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or INTERPRETED:
        raise ValueError("the benchmark needs a GPU and no TRITON_INTERPRET; inspect_kernels.py needs neither.")
    require_clean(arguments.output)
    records = []
    for record in all_records(arguments.tune, "cuda"):
        print(record, flush=True)
        records.append(record)
        # what was measured is kept when a later case is cut off
        write_result(arguments.output, {"records": records}, ["kernels"], seed=0)
    wrong = sum(map(is_wrong, records))
    print(f"{len(records)} records, {wrong} of our results failed or are wrong; wrote {arguments.output}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
