"""Times of every candidate configuration: `benchmark.py --tune`."""

from collections.abc import Iterator

import torch
from cases import Projection, Work, make_inputs, projection_inputs
from timing import FAILURES, median_us
from xcllama_kernels import configs, cross_attention_with_lse
from xcllama_kernels.backward import plan_backward
from xcllama_kernels.cases import Case
from xcllama_kernels.decode import plan_decode, rows_a_tile
from xcllama_kernels.forward import plan_forward
from xcllama_kernels.launch import Launch, Quantization, target_of
from xcllama_kernels.project import plan_projection


def tune(work: Work | Projection, device: torch.device) -> Iterator[dict[str, object]]:
    """A record for each candidate of a case."""
    candidates = _projections(work, device) if isinstance(work, Projection) else _attention(work, device)
    for launches in candidates:
        record = {"kind": work.kind, "kernel": launches[0].name, "config": vars(launches[0].config)}
        try:
            record["us"] = median_us([lambda launches=launches: [launch.run() for launch in launches]], device)
        except FAILURES as failure:
            record["failed"] = f"{type(failure).__name__}: {str(failure).splitlines()[:1]}"
        yield record


def _attention(work: Work, device: torch.device) -> Iterator[list[Launch]]:
    case, shape, target = make_inputs(work, device)[0], work.shape, target_of(device)
    dtype, head_dim = case.query.dtype, shape.head_dim
    output, lse = cross_attention_with_lse(*case.arguments, **case.quantization)
    if work.kind == "training":
        yield from _backward(case, output, lse, device)
        return
    if work.kind == "prefill":
        plan, candidates = plan_forward, configs.forward_configs(target, dtype, head_dim, work.bits)
    else:
        group = shape.num_heads // shape.num_kv_heads
        most = configs.decode_rows(dtype, head_dim)
        block_m = rows_a_tile(shape.batch, shape.contexts, shape.query_len, group, most)
        plan, candidates = plan_decode, configs.decode_configs(target, dtype, head_dim, work.bits, block_m)
    inputs = (*case.arguments[:3], Quantization(**case.quantization), *case.arguments[3:], output, lse)
    for config in candidates:
        yield plan(*inputs, head_dim**-0.5, config=config)


def _backward(case: Case, output: torch.Tensor, lse: torch.Tensor, device: torch.device) -> Iterator[list[Launch]]:
    head_dim, target = case.query.shape[-1], target_of(device)
    gradients = tuple(torch.empty_like(tensor) for tensor in case.arguments[:3])
    arguments = (torch.ones_like(output), None, *case.arguments, output, lse, head_dim**-0.5, gradients)
    by_query = configs.query_gradient_configs(target, case.query.dtype, head_dim)
    by_context = configs.context_gradient_configs(target, case.query.dtype, head_dim)
    for config in by_query:
        yield plan_backward(*arguments, configs=(config, by_context[0]))[:1]
    for config in by_context:
        yield plan_backward(*arguments, configs=(by_query[0], config))[1:]


def _projections(work: Projection, device: torch.device) -> Iterator[list[Launch]]:
    data, scale, zero, weight = projection_inputs(work, device)
    output = torch.empty(work.num_tokens, work.columns, dtype=weight.dtype, device=device)
    for config in configs.projection_configs(target_of(device), weight.dtype, work.bits):
        yield plan_projection(data, scale, zero, weight, None, None, None, output, config=config)
