"""Every variant of every kernel as launches planned on meta tensors: what `inspect_kernels.py` compiles."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from traffic import (
    Shape,
    Traffic,
    combine_traffic,
    context_gradient_traffic,
    decode_traffic,
    forward_traffic,
    projection_traffic,
    query_gradient_traffic,
)
from xcllama_kernels import configs
from xcllama_kernels.backward import plan_backward
from xcllama_kernels.decode import plan_decode
from xcllama_kernels.forward import plan_forward
from xcllama_kernels.launch import Launch, Quantization, Target
from xcllama_kernels.project import plan_projection
from xcllama_kernels.reference import int4_group

# whole heads of each class of configurations; the smallest head, and heads that fill their tile in part
WHOLE = (64, 128, 256)
PARTIAL = (16, 80, 192)
BITS = (0, 8, 4)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = (
    "forward_kernel",
    "decode_kernel",
    "combine_kernel",
    "query_gradient_kernel",
    "context_gradient_kernel",
    "inverse_rms_kernel",
    "project_kernel",
)


@dataclass(frozen=True)
class Variant:
    """One launch to compile, with what it is for."""

    launch: Launch
    traffic: Traffic
    dtype: str
    bits: int
    head_dim: int | None
    shape: dict[str, int]

    @property
    def kernel(self) -> str:
        return self.launch.name


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention_tensors(shape: Shape, dtype: torch.dtype, bits: int) -> dict[str, object]:
    """Arguments that the planning functions of attention share."""
    num_tokens = shape.contexts * shape.context_len
    heads = (num_tokens, shape.num_kv_heads)
    query = meta(shape.batch, shape.query_len, shape.num_heads, shape.head_dim, dtype=dtype)
    stored = {0: dtype, 8: torch.int8, 4: torch.uint8}[bits]
    key, value = (meta(*heads, shape.head_dim // (2 if bits == 4 else 1), dtype=stored) for _ in range(2))
    quantization = Quantization()
    if bits == 8:
        quantization = Quantization(*(meta(*heads, 3, dtype=torch.float16), None) * 2)
    elif bits == 4:
        groups = shape.head_dim // min(shape.head_dim, 64)
        scale, zero = meta(*heads, groups, 3, dtype=torch.float16), meta(*heads, groups, dtype=torch.float16)
        quantization = Quantization(*(scale, zero) * 2)
    return {
        "query": query, "key": key, "value": value, "quantization": quantization,
        "offsets": meta(shape.contexts + 1, dtype=torch.int32), "context_index": meta(shape.batch, dtype=torch.int32),
        "output": torch.empty_like(query), "scale": shape.head_dim**-0.5,
        "lse": meta(shape.batch, shape.num_heads, shape.query_len, dtype=torch.float32),
    }  # fmt: skip


def is_full(head_dim: int) -> bool:
    """Whether every configuration is compiled: partial heads add a mask to the code of whole ones, so that these show
    their default configuration."""
    return head_dim in WHOLE


def candidates(found: list[configs.Config], head_dim: int) -> list[configs.Config]:
    return found if is_full(head_dim) else found[:1]


def forward_variants(target: Target, name: str, bits: int, head_dim: int) -> Iterator[Variant]:
    shape = Shape(8, 8, 4096, 512, 32, 8, head_dim)
    tensors = attention_tensors(shape, DTYPES[name], bits)
    for config in candidates(configs.forward_configs(target, DTYPES[name], head_dim, bits), head_dim):
        (launch,) = plan_forward(**tensors, target=target, config=config)
        yield Variant(launch, forward_traffic(launch, shape), name, bits, head_dim, vars(shape))


def decode_variants(target: Target, name: str, bits: int, head_dim: int) -> Iterator[Variant]:
    """Every tile height: 4 query heads of as many rows that share a context, a context for each 4, 8, ... of 32 rows;
    and one row alone, whose context is split."""
    dtype = DTYPES[name]
    most = configs.decode_rows(dtype, head_dim)
    heights = [rows for rows in (16, 32, 64, 128) if rows <= most]
    for block_m in heights if is_full(head_dim) else heights[:1]:
        shape = Shape(32, 128 // block_m, 8192, 1, 32, 8, head_dim)
        tensors = attention_tensors(shape, dtype, bits)
        for config in candidates(configs.decode_configs(target, dtype, head_dim, bits, block_m), head_dim):
            launches = plan_decode(**tensors, target=target, config=config)
            yield Variant(launches[0], decode_traffic(launches, shape), name, bits, head_dim, vars(shape))
    if is_full(head_dim) or bits == 0:
        shape = Shape(1, 1, 16384, 1, 32, 8, head_dim)
        launches = plan_decode(**attention_tensors(shape, dtype, bits), target=target)
        yield Variant(launches[0], decode_traffic(launches, shape), name, bits, head_dim, vars(shape))
    if bits == 0:
        yield Variant(launches[1], combine_traffic(launches, shape), name, bits, head_dim, vars(shape))


def backward_variants(target: Target, name: str, head_dim: int) -> Iterator[Variant]:
    shape = Shape(8, 8, 4096, 512, 32, 8, head_dim)
    tensors = attention_tensors(shape, DTYPES[name], 0)
    del tensors["quantization"]
    tensors |= {"grad_output": tensors["query"], "grad_lse": None}
    gradients = (tensors["query"], tensors["key"], tensors["value"])
    by_query = candidates(configs.query_gradient_configs(target, DTYPES[name], head_dim), head_dim)
    by_context = candidates(configs.context_gradient_configs(target, DTYPES[name], head_dim), head_dim)
    for config in by_query:
        launch = plan_backward(**tensors, gradients=gradients, target=target, configs=(config, by_context[0]))[0]
        yield Variant(launch, query_gradient_traffic(launch, shape), name, 0, head_dim, vars(shape))
    for config in by_context:
        launch = plan_backward(**tensors, gradients=gradients, target=target, configs=(by_query[0], config))[1]
        yield Variant(launch, context_gradient_traffic(launch, shape), name, 0, head_dim, vars(shape))


def projection_variants(target: Target, name: str, bits: int) -> Iterator[Variant]:
    dtype = DTYPES[name]
    num_tokens, heads, columns = 8192, 64, 2048
    groups = () if bits == 8 else (1,)
    scale = meta(num_tokens, heads, *groups, 3, dtype=torch.float16)
    states = meta(num_tokens, heads, 64 if bits == 8 else 32, dtype=torch.int8 if bits == 8 else torch.uint8)
    zero = None if bits == 8 else meta(num_tokens, heads, *groups, dtype=torch.float16)
    weight, norm_weight = meta(columns, 64 * heads, dtype=dtype), meta(64 * heads, dtype=dtype)
    output = meta(num_tokens, columns, dtype=dtype)
    shape = {"num_tokens": num_tokens, "width": 64 * heads, "columns": columns}
    for number, config in enumerate(candidates(configs.projection_configs(target, dtype, bits), 64)):
        launches = plan_projection(
            states, scale, zero, weight, None, norm_weight, 1e-5, output, target=target, config=config
        )
        for launch in launches if number == 0 else launches[1:]:
            yield Variant(launch, projection_traffic(launch), name, bits, None, shape)


def all_variants(target: Target, name: str) -> Iterator[Variant]:
    """Every kernel in each format and configuration; whole heads, and in bf16 partial ones."""
    for head_dim in WHOLE + PARTIAL * (name == "bf16"):
        for bits in BITS:
            if bits != 4 or head_dim % int4_group(head_dim) == 0:
                yield from forward_variants(target, name, bits, head_dim)
                yield from decode_variants(target, name, bits, head_dim)
        yield from backward_variants(target, name, head_dim)
    for bits in BITS[1:]:
        yield from projection_variants(target, name, bits)


def one_variant_a_kernel(target: Target, name: str) -> list[Variant]:
    """The default configuration of each kernel: what continuous integration compiles."""
    found: dict[str, Variant] = {}
    candidates = [
        forward_variants(target, name, 4, 64),
        decode_variants(target, name, 0, 128),
        backward_variants(target, name, 64),
        projection_variants(target, name, 8),
    ]
    for variants in candidates:
        for variant in variants:
            found.setdefault(variant.kernel, variant)
    return [found[kernel] for kernel in KERNELS]
