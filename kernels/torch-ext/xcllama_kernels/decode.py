"""Decode, split over the context: few query rows a request, long contexts.

A tile holds the query heads of one KV head for the query positions of up to `BLOCK_M // (query_len * group)` batch
rows that share a context, so one read of the context serves them all. Each program finds its tile mates itself:
program b is the leader when its row is the 1st, (ROWS + 1)th, (2 ROWS + 1)th, ... of its context, else it returns. No
list is built on the host and nothing synchronizes. `combine_kernel` joins the splits in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import decode_configs, decode_rows
from .launch import Config, Launch, Quantization, Target, block_dim, strides, target_of
from .reference import int4_group
from .tiles import LN2, attend_context, context_bounds, log_sum, narrow, store_output


@triton.jit
def tile_mates(
    context_index, leader, batch, slots, ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Batch row of each tile row, how many batch rows the tile holds, and the leader's rank in its context."""
    context = tl.load(context_index + leader)
    rank = 0
    for first in range(0, leader, BLOCK_B):
        others = first + tl.arange(0, BLOCK_B)
        inside = others < leader
        same = inside & (tl.load(context_index + others, mask=inside, other=0) == context)
        rank += tl.sum(same.to(tl.int32), 0)
    found = 0
    mates = tl.zeros([BLOCK_M], tl.int32)
    if rank % ROWS == 0:
        for first in range(leader, batch, BLOCK_B):
            others = first + tl.arange(0, BLOCK_B)
            inside = others < batch
            same = (inside & (tl.load(context_index + others, mask=inside, other=0) == context)).to(tl.int32)
            place = found + tl.cumsum(same, 0) - 1
            hit = (same > 0)[:, None] & (place[:, None] == slots[None, :])
            mates += tl.sum(tl.where(hit, others[:, None], 0), 0)
            found += tl.sum(same, 0)
    return mates, tl.minimum(found, ROWS), rank


@triton.jit
def split_size(length, num_splits, BLOCK_N: tl.constexpr):
    """Tokens of a split: whole tiles, the same for every split but the last."""
    return tl.cdiv(tl.cdiv(length, num_splits), BLOCK_N) * BLOCK_N


@triton.jit
def decode_kernel(
    query, key, value, key_scale, key_zero, value_scale, value_zero, offsets, context_index, output, lse,
    batch, query_len, num_contexts, num_tokens, scale_log2,
    stride_query_batch, stride_query_token, stride_query_head,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    leader = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    num_kv_heads = tl.num_programs(1)
    rows = tl.arange(0, BLOCK_M)
    slots = rows // (query_len * GROUP)
    mates, num_mates, rank = tile_mates(context_index, leader, batch, slots, ROWS, BLOCK_B, BLOCK_M)
    start, end = context_bounds(offsets, tl.load(context_index + leader), num_contexts, num_tokens)
    size = split_size(end - start, tl.num_programs(2), BLOCK_N)
    first = start + split * size
    # an empty context still needs its zeros: split 0 writes them
    if (rank % ROWS == 0) & ((first < end) | (split == 0)):
        valid = slots < num_mates
        position = rows // GROUP % query_len
        query_head = (head * GROUP + rows % GROUP).to(tl.int64)
        query_rows = mates.to(tl.int64) * stride_query_batch + position.to(tl.int64) * stride_query_token
        query_rows += query_head * stride_query_head
        low, high, total = attend_context(
            query, query_rows, valid, key, key_scale, key_zero, value, value_scale, value_zero,
            first, tl.minimum(first + size, end), scale_log2,
            stride_key_token, stride_key_head, stride_value_token, stride_value_head,
            head, num_kv_heads, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, FORMAT, False, STAGES,
        )  # fmt: skip
        num_heads = num_kv_heads * GROUP
        row = split.to(tl.int64) * batch + mates
        output_rows = ((row * query_len + position) * num_heads + query_head) * HEAD_DIM
        store_output(output, output_rows, low, high, valid, HEAD_DIM, BLOCK_D, FORMAT)
        # partial sums stay in base 2 for the combine kernel
        total = total if SPLIT else total * LN2
        tl.store(lse + (row * num_heads + query_head) * query_len + position, total, mask=valid)


@triton.jit
def combine_kernel(
    partial, partial_lse, offsets, context_index, output, lse,
    batch, query_len, num_heads, num_contexts, num_tokens, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of one row by their log-sum-exp; splits past the end of a short context were never written."""
    head = tl.program_id(0) % num_heads
    position = tl.program_id(0) // num_heads % query_len
    row = tl.program_id(0) // num_heads // query_len
    start, end = context_bounds(offsets, tl.load(context_index + row), num_contexts, num_tokens)
    size = split_size(end - start, num_splits, BLOCK_N)
    live = tl.maximum(tl.cdiv(end - start, tl.maximum(size, 1)), 1)
    splits = tl.arange(0, BLOCK_S)
    lse_row = (row.to(tl.int64) * num_heads + head) * query_len + position
    # an argument of 1 is a constant, which has no `.to`
    stride = tl.cast(batch, tl.int64) * query_len * num_heads
    parts = tl.load(partial_lse + splits * stride + lse_row, mask=splits < live, other=-float("inf"))
    largest = tl.max(parts, 0)
    # keep the pivot finite: an empty context would give inf - inf
    pivot = tl.where(largest > -float("inf"), largest, 0.0)
    total = tl.sum(tl.exp2(parts - pivot), 0)
    channels = tl.arange(0, BLOCK_D)
    inside = channels < HEAD_DIM
    output_row = ((row.to(tl.int64) * query_len + position) * num_heads + head) * HEAD_DIM
    result = tl.zeros([BLOCK_D], tl.float32)
    for split in range(0, live):
        weight = tl.exp2(tl.load(partial_lse + split * stride + lse_row) - pivot)
        result += weight * tl.load(partial + split * stride * HEAD_DIM + output_row + channels, mask=inside, other=0.0)
    result = result / tl.where(total > 0, total, 1.0)
    tl.store(output + output_row + channels, narrow(result, output.dtype.element_ty), mask=inside)
    tl.store(lse + lse_row, log_sum(pivot, total) * LN2)


def rows_a_tile(batch: int, num_contexts: int, query_len: int, group: int, most: int) -> int:
    """Tile rows for the mean number of batch rows that share a context: a power of two from 16 to `most`."""
    rows = query_len * group * triton.cdiv(batch, num_contexts)
    return min(most, max(16, triton.next_power_of_2(rows)))


def choose_splits(target: Target, num_tiles: int, num_tokens: int, mean_bytes: float, partial_bytes: int) -> int:
    """Splits that give each processor one program, unless the partial results would pass 1/32 of what is read.

    Args:
        num_tiles: programs of one split.
        num_tokens: of all contexts together; no split is shorter than 64 of them.
        mean_bytes: keys and values of one KV head of a mean context.
        partial_bytes: what one split of one tile writes and the combine kernel reads.
    """
    most = int(mean_bytes / (32 * partial_bytes))
    return max(1, min(target.num_processors // max(num_tiles, 1), num_tokens // 64, most, 64))


def token_bytes(states: Tensor, bits: int) -> float:
    """Bytes of one token and head, scales, outliers and zeros included."""
    dim = states.shape[2]
    return {0: dim * states.element_size(), 8: dim + 6, 4: dim + 8 * (2 * dim // int4_group(2 * dim))}[bits]


def plan_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    quantization: Quantization,
    offsets: Tensor,
    context_index: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    target: Target | None = None,
    config: Config | None = None,
    num_splits: int | None = None,
) -> list[Launch]:
    """The launches that fill `output` and `lse`: `decode_kernel`, then `combine_kernel` when the context is split."""
    batch, query_len, num_heads, head_dim = query.shape
    num_tokens, num_kv_heads = key.shape[:2]
    num_contexts = offsets.shape[0] - 1
    group = num_heads // num_kv_heads
    bits = quantization.bits
    target = target or target_of(query.device)
    block_m = rows_a_tile(batch, num_contexts, query_len, group, decode_rows(query.dtype, head_dim))
    config = config or decode_configs(target, query.dtype, head_dim, bits, block_m)[0]
    mates = config.block_m // (query_len * group)
    num_tiles = num_kv_heads * max(min(batch, num_contexts), triton.cdiv(batch, mates))
    mean_bytes = num_tokens / num_contexts * (token_bytes(key, bits) + token_bytes(value, bits))
    rows = query_len * group * min(mates, triton.cdiv(batch, num_contexts))
    num_splits = num_splits or choose_splits(target, num_tiles, num_tokens, mean_bytes, rows * 8 * (head_dim + 2))
    partial, partial_lse = output, lse
    if num_splits > 1:
        partial = torch.empty(num_splits, *output.shape, dtype=torch.float32, device=query.device)
        partial_lse = torch.empty(num_splits, *lse.shape, dtype=torch.float32, device=query.device)
    context = {"offsets": offsets, "context_index": context_index}
    sizes = {"batch": batch, "query_len": query_len, "num_contexts": num_contexts, "num_tokens": num_tokens}
    arguments = {
        "query": query, "key": key, "value": value, **quantization._asdict(), **context, "output": partial,
        "lse": partial_lse, **sizes, "scale_log2": scale * math.log2(math.e),
        **strides(query=query, key=key, value=value),
    }  # fmt: skip
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_dim(head_dim // 2 if bits == 4 else head_dim),
        "FORMAT": bits,
        "ROWS": mates,
        "BLOCK_B": min(64, max(16, triton.next_power_of_2(batch))),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SPLIT": num_splits > 1,
        "STAGES": config.num_stages,
    }
    decode = Launch(decode_kernel, (batch, num_kv_heads, num_splits), arguments, config, constants)
    if num_splits == 1:
        return [decode]
    arguments = {
        "partial": partial, "partial_lse": partial_lse, **context, "output": output, "lse": lse,
        **sizes, "num_heads": num_heads, "num_splits": num_splits,
    }  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_dim(head_dim),
        "BLOCK_S": triton.next_power_of_2(num_splits),
        "BLOCK_N": config.block_n,
    }
    combine = Launch(combine_kernel, (batch * query_len * num_heads,), arguments, Config(1, 1, 1, 1), constants)
    return [decode, combine]
