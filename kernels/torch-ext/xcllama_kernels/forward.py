"""Forward for prefill and training: one tile of packed query rows walks over one context.

Row m of a (batch row, KV head) is query position m // group, query head m % group, so that all query heads of one KV
head share each key tile.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from .configs import forward_configs
from .launch import Config, Launch, Quantization, Target, block_dim, strides, target_of
from .tiles import LN2, attend_context, context_bounds, store_output


@triton.jit
def forward_kernel(
    query, key, value, key_scale, key_zero, value_scale, value_zero, offsets, context_index, output, lse,
    query_len, num_row_tiles, num_contexts, num_tokens, scale_log2,
    stride_query_batch, stride_query_token, stride_query_head,
    stride_key_token, stride_key_head, stride_value_token, stride_value_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % num_row_tiles
    batch = tl.program_id(0) // num_row_tiles
    head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    start, end = context_bounds(offsets, tl.load(context_index + batch), num_contexts, num_tokens)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < query_len * GROUP
    position = rows // GROUP
    query_head = (head * GROUP + rows % GROUP).to(tl.int64)
    query_rows = position.to(tl.int64) * stride_query_token + query_head * stride_query_head
    low, high, total = attend_context(
        query + batch.to(tl.int64) * stride_query_batch, query_rows, valid,
        key, key_scale, key_zero, value, value_scale, value_zero,
        start, end, scale_log2, stride_key_token, stride_key_head, stride_value_token, stride_value_head,
        head, num_kv_heads, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, FORMAT, True, STAGES,
    )  # fmt: skip
    num_heads = num_kv_heads * GROUP
    output_rows = ((batch.to(tl.int64) * query_len + position) * num_heads + query_head) * HEAD_DIM
    store_output(output, output_rows, low, high, valid, HEAD_DIM, BLOCK_D, FORMAT)
    lse_rows = (batch.to(tl.int64) * num_heads + query_head) * query_len + position
    tl.store(lse + lse_rows, total * LN2, mask=valid)


def plan_forward(
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
) -> list[Launch]:
    """The launch that fills `output` (dense, like `query`) and `lse` (float32 `[batch, num_heads, query_len]`)."""
    batch, query_len, num_heads, head_dim = query.shape
    num_tokens, num_kv_heads = key.shape[:2]
    group = num_heads // num_kv_heads
    bits = quantization.bits
    target = target or target_of(query.device)
    config = config or forward_configs(target, query.dtype, head_dim, bits)[0]
    num_row_tiles = triton.cdiv(query_len * group, config.block_m)
    arguments = {
        "query": query, "key": key, "value": value, **quantization._asdict(), "offsets": offsets,
        "context_index": context_index, "output": output, "lse": lse, "query_len": query_len,
        "num_row_tiles": num_row_tiles, "num_contexts": offsets.shape[0] - 1, "num_tokens": num_tokens,
        "scale_log2": scale * math.log2(math.e), **strides(query=query, key=key, value=value),
    }  # fmt: skip
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_dim(head_dim // 2 if bits == 4 else head_dim),
        "FORMAT": bits,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
    }
    return [Launch(forward_kernel, (batch * num_row_tiles, num_kv_heads, 1), arguments, config, constants)]
