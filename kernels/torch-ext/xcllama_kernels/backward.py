"""Backward: gradients of query, key and value, each element written by one program in a fixed order (deterministic).

`query_gradient_kernel` walks over the context of a tile of query rows and leaves delta = sum(output * grad_output).
`context_gradient_kernel` holds a tile of one context's tokens and walks over all query rows that attend to that
context: rows that share a context are summed without atomics.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import context_gradient_configs, query_gradient_configs
from .launch import Config, Launch, Target, block_dim, strides, target_of
from .tiles import context_bounds, dot, load_rows, narrow, store_rows

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def channel_products(left, right):
    """`[rows of left, rows of right]` sums over the channels, float32."""
    if left.dtype == tl.float32 and left.shape[1] > 128:
        # the plain units hold whole rows of both operands in a thread's registers: parts of 64 channels do not spill
        PARTS: tl.constexpr = left.shape[1] // 64
        left_parts = tl.permute(tl.reshape(left, [left.shape[0], PARTS, 64]), (1, 0, 2))
        right_parts = tl.reshape(tl.trans(right), [PARTS, 64, right.shape[0]])
        products = tl.sum(tl.dot(left_parts, right_parts, input_precision="ieee"), 0)
    else:
        products = dot(left, tl.trans(right), tl.zeros([left.shape[0], right.shape[0]], tl.float32))
    return products


@triton.jit
def query_gradient_kernel(
    query, key, value, offsets, context_index, output, lse, grad_output, grad_lse, delta, grad_query,
    query_len, num_row_tiles, num_contexts, num_tokens, scale,
    stride_query_batch, stride_query_token, stride_query_head,
    stride_grad_batch, stride_grad_token, stride_grad_head,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % num_row_tiles
    batch = (tl.program_id(0) // num_row_tiles).to(tl.int64)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP
    start, end = context_bounds(offsets, tl.load(context_index + batch), num_contexts, num_tokens)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < query_len * GROUP
    position = (rows // GROUP).to(tl.int64)
    query_head = (head * GROUP + rows % GROUP).to(tl.int64)

    query_rows = batch * stride_query_batch + position * stride_query_token + query_head * stride_query_head
    states = load_rows(query, query_rows, valid, HEAD_DIM, BLOCK_D)
    grad_rows = batch * stride_grad_batch + position * stride_grad_token + query_head * stride_grad_head
    grad = load_rows(grad_output, grad_rows, valid, HEAD_DIM, BLOCK_D)
    output_rows = ((batch * query_len + position) * num_heads + query_head) * HEAD_DIM
    lse_rows = (batch * num_heads + query_head) * query_len + position
    row_delta = tl.sum(
        load_rows(output, output_rows, valid, HEAD_DIM, BLOCK_D).to(tl.float32) * grad.to(tl.float32), 1
    )
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + lse_rows, mask=valid, other=0.0)
    tl.store(delta + lse_rows, row_delta, mask=valid)
    row_lse = tl.load(lse + lse_rows, mask=valid, other=0.0) * LOG2E

    key += head.to(tl.int64) * stride_key_head
    value += head.to(tl.int64) * stride_value_head
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        tokens = first + tl.arange(0, BLOCK_N)
        inside = tokens < end
        keys = load_rows(key, tokens.to(tl.int64) * stride_key_token, inside, HEAD_DIM, BLOCK_D)
        values = load_rows(value, tokens.to(tl.int64) * stride_value_token, inside, HEAD_DIM, BLOCK_D)
        scores = channel_products(states, keys)
        weights = tl.exp2(scores * (scale * LOG2E) - row_lse[:, None])
        # zero keys past the end would weigh exp2(-lse), which may be infinite
        weights = tl.where(inside[None, :], weights, 0.0)
        grad_weights = channel_products(grad, values)
        grad_scores = weights * (grad_weights - row_delta[:, None])
        result = dot(narrow(grad_scores, keys.dtype), keys, result)
    store_rows(grad_query, output_rows, narrow(result * scale, states.dtype), valid, HEAD_DIM, BLOCK_D)


@triton.jit
def context_gradient_kernel(
    query, key, value, offsets, tile_context, tile_offsets, order, row_offsets, lse, grad_output, delta,
    grad_key, grad_value, query_len, num_contexts, num_tokens, scale,
    stride_query_batch, stride_query_token, stride_query_head,
    stride_grad_batch, stride_grad_token, stride_grad_head,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    context = tl.load(tile_context + tl.program_id(0))
    if context < num_contexts:
        head = tl.program_id(1)
        num_kv_heads = tl.num_programs(1)
        num_heads = num_kv_heads * GROUP
        start, end = context_bounds(offsets, context, num_contexts, num_tokens)
        tokens = start + (tl.program_id(0) - tl.load(tile_offsets + context)) * BLOCK_N + tl.arange(0, BLOCK_N)
        # the tile of offsets that decrease (unchecked in a CUDA graph) may lie before the context
        inside = (tokens >= start) & (tokens < end)
        token_rows = tokens.to(tl.int64)
        key_rows = token_rows * stride_key_token + head.to(tl.int64) * stride_key_head
        value_rows = token_rows * stride_value_token + head.to(tl.int64) * stride_value_head
        keys = load_rows(key, key_rows, inside, HEAD_DIM, BLOCK_D)
        values = load_rows(value, value_rows, inside, HEAD_DIM, BLOCK_D)
        key_result = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        value_result = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

        # the rows of this context are one list of packed query rows: batch row, position, head of the group
        first_row = tl.load(row_offsets + context)
        num_packed = (tl.load(row_offsets + context + 1) - first_row) * query_len * GROUP
        for first in tl.range(0, num_packed, BLOCK_M, num_stages=STAGES):
            rows = first + tl.arange(0, BLOCK_M)
            valid = rows < num_packed
            batch = tl.load(order + first_row + rows // (query_len * GROUP), mask=valid, other=0).to(tl.int64)
            position = (rows // GROUP % query_len).to(tl.int64)
            query_head = (head * GROUP + rows % GROUP).to(tl.int64)
            query_rows = batch * stride_query_batch + position * stride_query_token + query_head * stride_query_head
            states = load_rows(query, query_rows, valid, HEAD_DIM, BLOCK_D)
            grad_rows = batch * stride_grad_batch + position * stride_grad_token + query_head * stride_grad_head
            grad = load_rows(grad_output, grad_rows, valid, HEAD_DIM, BLOCK_D)
            lse_rows = (batch * num_heads + query_head) * query_len + position
            row_lse = tl.load(lse + lse_rows, mask=valid, other=0.0) * LOG2E
            row_delta = tl.load(delta + lse_rows, mask=valid, other=0.0)
            scores = dot(keys, tl.trans(states), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
            weights = tl.exp2(scores * (scale * LOG2E) - row_lse[None, :])
            value_result = dot(narrow(weights, grad.dtype), grad, value_result)
            grad_weights = dot(values, tl.trans(grad), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
            grad_scores = weights * (grad_weights - row_delta[None, :])
            key_result = dot(narrow(grad_scores, states.dtype), states, key_result)

        result_rows = (token_rows * num_kv_heads + head) * HEAD_DIM
        store_rows(grad_key, result_rows, narrow(key_result * scale, keys.dtype), inside, HEAD_DIM, BLOCK_D)
        store_rows(grad_value, result_rows, narrow(value_result, values.dtype), inside, HEAD_DIM, BLOCK_D)


def rows_by_context(context_index: Tensor, num_contexts: int) -> tuple[Tensor, Tensor]:
    """Batch rows sorted by context (`order`), and where each context's begin (`row_offsets`), int32."""
    ordered, order = torch.sort(context_index, stable=True)
    bounds = torch.arange(num_contexts + 1, dtype=ordered.dtype, device=ordered.device)
    return order.to(torch.int32), torch.searchsorted(ordered, bounds, out_int32=True)


def token_tiles(offsets: Tensor, num_tokens: int, block_n: int) -> tuple[Tensor, Tensor]:
    """The context of each tile of `block_n` tokens (num_contexts: none) and each context's first tile."""
    num_contexts = offsets.shape[0] - 1
    tiles = (offsets[1:] - offsets[:-1] + block_n - 1) // block_n
    tile_offsets = torch.nn.functional.pad(tiles.cumsum(0), (1, 0))
    # an upper bound that needs no synchronization: a remainder a context
    programs = torch.arange(num_tokens // block_n + num_contexts, dtype=tile_offsets.dtype, device=offsets.device)
    context = torch.searchsorted(tile_offsets[1:].contiguous(), programs, right=True, out_int32=True)
    return context, tile_offsets.to(torch.int32)


def plan_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    context_index: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    gradients: tuple[Tensor, ...],
    target: Target | None = None,
    configs: tuple[Config, Config] | None = None,
) -> list[Launch]:
    """The launches that fill `gradients`: (query,) or (query, key, value), each dense."""
    batch, query_len, num_heads, head_dim = query.shape
    num_tokens, num_kv_heads = key.shape[:2]
    num_contexts = offsets.shape[0] - 1
    target = target or target_of(query.device)
    if configs is None:
        configs = (
            query_gradient_configs(target, query.dtype, head_dim)[0],
            context_gradient_configs(target, query.dtype, head_dim)[0],
        )
    group = num_heads // num_kv_heads
    delta = torch.empty_like(lse)
    common = {
        "query": query, "key": key, "value": value, "offsets": offsets, "lse": lse, "grad_output": grad_output,
        "delta": delta, "query_len": query_len, "num_contexts": num_contexts, "num_tokens": num_tokens,
        "scale": scale, **strides(query=query, grad=grad_output, key=key, value=value),
    }  # fmt: skip

    def constants(config: Config) -> dict[str, object]:
        blocks = {"BLOCK_D": block_dim(head_dim), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        return {"GROUP": group, "HEAD_DIM": head_dim, **blocks, "STAGES": config.num_stages}

    row_tiles = triton.cdiv(query_len * group, configs[0].block_m)
    arguments = common | {
        "context_index": context_index, "output": output, "grad_lse": grad_lse, "grad_query": gradients[0],
        "num_row_tiles": row_tiles,
    }  # fmt: skip
    grid = (batch * row_tiles, num_kv_heads)
    launches = [Launch(query_gradient_kernel, grid, arguments, configs[0], constants(configs[0]))]
    if len(gradients) == 1:
        return launches
    order, row_offsets = rows_by_context(context_index, num_contexts)
    tile_context, tile_offsets = token_tiles(offsets, num_tokens, configs[1].block_n)
    arguments = common | {
        "tile_context": tile_context, "tile_offsets": tile_offsets, "order": order, "row_offsets": row_offsets,
        "grad_key": gradients[1], "grad_value": gradients[2],
    }  # fmt: skip
    grid = (tile_context.shape[0], num_kv_heads)
    return [*launches, Launch(context_gradient_kernel, grid, arguments, configs[1], constants(configs[1]))]
