"""Projection of quantized hidden states: dequantize in registers, RMS-norm, multiply by the weight.

`inverse_rms_kernel` reads the states once for the norm; `project_kernel` is a tiled product whose left operand is
dequantized (and normed) on its way to the tensor cores, so no float copy of the cache ever exists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import projection_configs
from .launch import Config, Launch, Target, data_format, target_of
from .reference import int4_group
from .tiles import dot, load_rows, narrow, with_outliers


@triton.jit
def load_factor(base, places, valid):
    """One float32 factor a row, as a column."""
    return tl.load(base + places, mask=valid, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_scales(scale, places, valid):
    """Factor and both outliers of one group a row, the `places`-th of all."""
    outlier = load_factor(scale, places * 3 + 1, valid)
    second = load_factor(scale, places * 3 + 2, valid)
    return load_factor(scale, places * 3, valid), outlier, second


@triton.jit
def load_chunk(
    states, scale, zero, rows, valid, stride, chunk,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns of the stored rows from `chunk * BLOCK_K` on, dequantized to fp32, and the channel they begin at: for
    int4 the low and (DIM // 2 channels later) the high nibbles, one tile twice otherwise."""
    STORED: tl.constexpr = DIM // 2 if FORMAT == 4 else DIM
    GROUPS: tl.constexpr = DIM // GROUP
    column = chunk * BLOCK_K
    head = column // STORED
    first = column % STORED
    pointers = rows.to(tl.int64) * stride + column
    columns = tl.arange(0, BLOCK_K)
    if STORED % BLOCK_K == 0:
        raw = load_rows(states, pointers, valid, BLOCK_K, BLOCK_K)
        inside = columns < BLOCK_K
    else:
        inside = columns < HEADS * STORED - column
        mask = valid[:, None] & inside[None, :]
        raw = tl.load(states + pointers[:, None] + columns[None, :], mask=mask, other=0)
    groups = (rows.to(tl.int64) * HEADS + head) * GROUPS
    factor, outlier, second = load_scales(scale, groups + first // GROUP, valid)
    if FORMAT == 8:
        channel = column
        low = with_outliers(raw, raw.to(tl.float32) * factor, outlier, second, 8)
        high = low
    else:
        channel = head * DIM + first
        bottom = load_factor(zero, groups + first // GROUP, valid)
        codes = raw & 15
        low = with_outliers(codes, codes.to(tl.float32) * factor + bottom, outlier, second, 4)
        if GROUPS > 1:
            factor, outlier, second = load_scales(scale, groups + (first + STORED) // GROUP, valid)
            bottom = load_factor(zero, groups + (first + STORED) // GROUP, valid)
        codes = raw >> 4
        high = with_outliers(codes, codes.to(tl.float32) * factor + bottom, outlier, second, 4)
        low = tl.where(inside[None, :], low, 0.0)
        high = tl.where(inside[None, :], high, 0.0)
    return low, high, channel, inside


@triton.jit
def inverse_rms_kernel(
    states, scale, zero, inverse_rms, num_tokens, eps, stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < num_tokens
    total = tl.zeros([BLOCK_M], tl.float32)
    for chunk in range(0, CHUNKS):
        low, high, _, _ = load_chunk(
            states, scale, zero, rows, valid, stride, chunk, HEADS, DIM, GROUP, FORMAT, BLOCK_K
        )
        total += tl.sum(low * low, 1)
        if FORMAT == 4:
            total += tl.sum(high * high, 1)
    tl.store(inverse_rms + rows, 1.0 / tl.sqrt(total / (HEADS * DIM) + eps), mask=valid)


@triton.jit
def project_half(
    states, channel, inside, weight, norm_weight, inverse_rms, columns, in_columns, stride_weight, accumulator,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, BLOCK_K)
    if norm_weight is not None:
        factor = tl.load(norm_weight + channel + channels, mask=inside, other=0.0).to(tl.float32)
        states = states * inverse_rms[:, None] * factor[None, :]
    pointers = weight + channel + columns.to(tl.int64)[:, None] * stride_weight + channels[None, :]
    tile = tl.load(pointers, mask=in_columns[:, None] & inside[None, :], other=0.0)
    return dot(narrow(states, tile.dtype), tl.trans(tile), accumulator)


@triton.jit
def project_kernel(
    states, scale, zero, weight, bias, norm_weight, inverse_rms, output,
    num_tokens, num_columns, num_row_tiles, stride, stride_weight,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # programs that share a weight tile are neighbours
    rows = tl.program_id(0) % num_row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) // num_row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = rows < num_tokens
    in_columns = columns < num_columns
    row_factor = tl.full([BLOCK_M], 1.0, tl.float32)
    if norm_weight is not None:
        row_factor = tl.load(inverse_rms + rows, mask=valid, other=0.0)
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for chunk in tl.range(0, CHUNKS, num_stages=STAGES):
        low, high, channel, inside = load_chunk(
            states, scale, zero, rows, valid, stride, chunk, HEADS, DIM, GROUP, FORMAT, BLOCK_K
        )
        result = project_half(
            low, channel, inside, weight, norm_weight, row_factor, columns, in_columns, stride_weight, result,
            BLOCK_K,
        )  # fmt: skip
        if FORMAT == 4:
            result = project_half(
                high, channel + DIM // 2, inside, weight, norm_weight, row_factor, columns, in_columns, stride_weight,
                result, BLOCK_K,
            )  # fmt: skip
    if bias is not None:
        result += tl.load(bias + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    pointers = output + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(pointers, narrow(result, output.dtype.element_ty), mask=valid[:, None] & in_columns[None, :])


def plan_projection(
    states: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float | None,
    output: Tensor,
    target: Target | None = None,
    config: Config | None = None,
) -> list[Launch]:
    """The launches that fill `output` `[num_tokens, out]`; the rows of `states` are dense."""
    num_tokens, heads, stored = states.shape
    bits = data_format(scale, zero)
    dim = 2 * stored if bits == 4 else stored
    target = target or target_of(states.device)
    config = config or projection_configs(target, weight.dtype, bits)[0]
    # a chunk stays within one group of channels; only a single narrow or odd head needs a masked chunk
    block_k = 64 if stored % 64 == 0 else 32 if stored % 32 == 0 else min(64, max(16, triton.next_power_of_2(stored)))
    common = {"states": states, "scale": scale, "zero": zero, "num_tokens": num_tokens, "stride": states.stride(0)}
    layout = {
        "HEADS": heads, "DIM": dim, "GROUP": int4_group(dim) if bits == 4 else dim, "FORMAT": bits,
        "BLOCK_M": config.block_m, "BLOCK_K": block_k, "CHUNKS": triton.cdiv(heads * stored, block_k),
    }  # fmt: skip
    num_row_tiles = triton.cdiv(num_tokens, config.block_m)
    launches, inverse_rms = [], None
    if norm_weight is not None:
        inverse_rms = torch.empty(num_tokens, dtype=torch.float32, device=states.device)
        arguments = common | {"inverse_rms": inverse_rms, "eps": norm_eps}
        block = Config(16, 1, 4, 1)
        tiles = (triton.cdiv(num_tokens, block.block_m),)
        launches.append(Launch(inverse_rms_kernel, tiles, arguments, block, layout | {"BLOCK_M": block.block_m}))
    arguments = common | {
        "weight": weight, "bias": bias, "norm_weight": norm_weight, "inverse_rms": inverse_rms, "output": output,
        "num_columns": weight.shape[0], "num_row_tiles": num_row_tiles, "stride_weight": weight.stride(0),
    }  # fmt: skip
    constants = layout | {"BLOCK_N": config.block_n, "STAGES": config.num_stages}
    grid = (num_row_tiles * triton.cdiv(weight.shape[0], config.block_n),)
    return [*launches, Launch(project_kernel, grid, arguments, config, constants)]
