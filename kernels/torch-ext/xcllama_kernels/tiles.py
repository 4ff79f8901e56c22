"""Pieces that the kernels share: bounds of a context, loads with dequantization, dot products, the online softmax."""

import triton
import triton.language as tl

from .launch import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(left, right, accumulator):
    # the interpreter holds bfloat16 as raw bits, which numpy would multiply as integers
    if INTERPRETED and left.dtype == tl.bfloat16:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision="ieee")


@triton.jit
def narrow(tile, dtype: tl.constexpr):
    """A float32 tile in `dtype`, rounded to nearest even."""
    # the interpreter truncates to bfloat16, the hardware rounds
    if INTERPRETED and dtype == tl.bfloat16:
        bits = tile.to(tl.int32, bitcast=True)
        tile = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tile.to(dtype)


@triton.jit
def context_bounds(offsets, context, num_contexts, num_tokens):
    """First token of a context and the end of its last, clamped to the tensors: no read leaves them."""
    context = tl.minimum(tl.maximum(context, 0), num_contexts - 1)
    start = tl.minimum(tl.maximum(tl.load(offsets + context), 0), num_tokens).to(tl.int32)
    end = tl.minimum(tl.maximum(tl.load(offsets + context + 1), start), num_tokens).to(tl.int32)
    return start, end


@triton.jit
def load_rows(base, rows, valid, size: tl.constexpr, BLOCK: tl.constexpr):
    """`[rows, BLOCK]` channels at `base + rows` (64-bit), zeros past `size` and where not valid."""
    channels = tl.arange(0, BLOCK)
    pointers = base + rows.to(tl.int64)[:, None] + channels[None, :]
    if size == BLOCK:
        tile = tl.load(pointers, mask=valid[:, None], other=0)
    else:
        tile = tl.load(pointers, mask=valid[:, None] & (channels < size)[None, :], other=0)
    return tile


@triton.jit
def store_rows(base, rows, tile, valid, size: tl.constexpr, BLOCK: tl.constexpr):
    """Store `[rows, BLOCK]` channels at `base + rows`, `size` channels of the valid rows."""
    channels = tl.arange(0, BLOCK)
    inside = valid[:, None] & (channels < size)[None, :]
    tl.store(base + rows.to(tl.int64)[:, None] + channels[None, :], tile, mask=inside)


@triton.jit
def log_sum(row_max, row_sum):
    """Base-2 log-sum-exp; minus infinity for rows that met no token."""
    return tl.where(row_sum > 0, row_max + tl.log2(tl.where(row_sum > 0, row_sum, 1.0)), -float("inf"))


@triton.jit
def load_group(
    base, heads, valid, first: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    PER_GROUP: tl.constexpr,
):  # fmt: skip
    """Scales, outliers or zeros, fp32, of SIZE channels from channel `first` on; `heads` is token * num_heads + head,
    and a group has PER_GROUP values, of which `base` points at one."""
    GROUP: tl.constexpr = 64 if DIM > 64 else DIM
    GROUPS: tl.constexpr = DIM // GROUP
    if first // GROUP == (first + SIZE - 1) // GROUP:
        factors = tl.load(base + (heads * GROUPS + first // GROUP) * PER_GROUP, mask=valid, other=0.0)[:, None]
    else:
        channels = tl.arange(0, BLOCK)
        pointers = base + ((heads * GROUPS)[:, None] + ((first + channels) // GROUP)[None, :]) * PER_GROUP
        factors = tl.load(pointers, mask=valid[:, None] & (channels < SIZE)[None, :], other=0.0)
    return factors.to(tl.float32)


@triton.jit
def with_outliers(codes, values, outlier, second, FORMAT: tl.constexpr):
    """fp32 `values` of codes, and the two outliers of a group where codes say so."""
    FIRST: tl.constexpr = 14 if FORMAT == 4 else -128
    SECOND: tl.constexpr = 15 if FORMAT == 4 else 127
    return tl.where(codes == FIRST, outlier, tl.where(codes == SECOND, second, values))


@triton.jit
def load_scales(
    scale, heads, valid, first: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Factors and both outliers of the groups of SIZE channels from channel `first` on."""
    factor = load_group(scale, heads, valid, first, DIM, SIZE, BLOCK, 3)
    outlier = load_group(scale + 1, heads, valid, first, DIM, SIZE, BLOCK, 3)
    second = load_group(scale + 2, heads, valid, first, DIM, SIZE, BLOCK, 3)
    return factor, outlier, second


@triton.jit
def load_states(
    base, scale, zero, tokens, valid, stride, head, num_heads,
    dtype: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Keys or values of `tokens`, dequantized in registers to `dtype`: the lower and the upper half of the channels
    for int4, one tile twice otherwise. `base` points at the head."""
    heads = tokens.to(tl.int64) * num_heads + head
    rows = tokens.to(tl.int64) * stride
    if FORMAT == 0:
        low = load_rows(base, rows, valid, HEAD_DIM, BLOCK_D)
        high = low
    elif FORMAT == 8:
        codes = load_rows(base, rows, valid, HEAD_DIM, BLOCK_D)
        factor, outlier, second = load_scales(scale, heads, valid, 0, 64, 64, BLOCK_D)
        low = narrow(with_outliers(codes, codes.to(tl.float32) * factor, outlier, second, 8), dtype)
        high = low
    else:
        HALF: tl.constexpr = HEAD_DIM // 2
        pairs = load_rows(base, rows, valid, HALF, BLOCK_D)
        factor, outlier, second = load_scales(scale, heads, valid, 0, HEAD_DIM, HALF, BLOCK_D)
        bottom = load_group(zero, heads, valid, 0, HEAD_DIM, HALF, BLOCK_D, 1)
        codes = pairs & 15
        low = narrow(with_outliers(codes, codes.to(tl.float32) * factor + bottom, outlier, second, 4), dtype)
        if HEAD_DIM > 64:
            factor, outlier, second = load_scales(scale, heads, valid, HALF, HEAD_DIM, HALF, BLOCK_D)
            bottom = load_group(zero, heads, valid, HALF, HEAD_DIM, HALF, BLOCK_D, 1)
        codes = pairs >> 4
        high = narrow(with_outliers(codes, codes.to(tl.float32) * factor + bottom, outlier, second, 4), dtype)
    return low, high


@triton.jit
def attend(
    query_low, query_high, output_low, output_high, row_max, row_sum,
    key, key_scale, key_zero, value, value_scale, value_zero,
    first, last, end, scale_log2, stride_key, stride_value, head, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr,
    MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tokens [first, last), in steps of BLOCK_N; tokens from `end` on count for nothing."""
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        tokens = start + tl.arange(0, BLOCK_N)
        inside = tokens < end
        low, high = load_states(
            key, key_scale, key_zero, tokens, inside, stride_key, head, num_heads,
            query_low.dtype, HEAD_DIM, BLOCK_D, FORMAT,
        )  # fmt: skip
        scores = dot(query_low, tl.trans(low), tl.zeros([query_low.shape[0], BLOCK_N], tl.float32))
        if FORMAT == 4:
            scores = dot(query_high, tl.trans(high), scores)
        scores = scores * scale_log2
        if MASKED:
            scores = tl.where(inside[None, :], scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        correction = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        row_sum = row_sum * correction + tl.sum(weights, 1)
        row_max = new_max
        low, high = load_states(
            value, value_scale, value_zero, tokens, inside, stride_value, head, num_heads,
            query_low.dtype, HEAD_DIM, BLOCK_D, FORMAT,
        )  # fmt: skip
        weights = narrow(weights, query_low.dtype)
        output_low = dot(weights, low, output_low * correction[:, None])
        if FORMAT == 4:
            output_high = dot(weights, high, output_high * correction[:, None])
    return output_low, output_high, row_max, row_sum


@triton.jit
def attend_context(
    query, query_rows, valid, key, key_scale, key_zero, value, value_scale, value_zero,
    first, last, scale_log2, stride_key_token, stride_key_head, stride_value_token, stride_value_head, head, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr,
    REMAINDER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Output (in halves for int4, one tile twice otherwise) and base-2 log-sum-exp of a tile of query rows over the
    tokens [first, last). REMAINDER: whole tiles run without a mask, and one masked tile follows."""
    PART: tl.constexpr = HEAD_DIM // 2 if FORMAT == 4 else HEAD_DIM
    query_low = load_rows(query, query_rows, valid, PART, BLOCK_D)
    query_high = query_low
    if FORMAT == 4:
        query_high = load_rows(query + PART, query_rows, valid, PART, BLOCK_D)
    output_low = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    output_high = output_low
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    key += head.to(tl.int64) * stride_key_head
    value += head.to(tl.int64) * stride_value_head
    whole = first
    if REMAINDER:
        whole = first + (last - first) // BLOCK_N * BLOCK_N
        output_low, output_high, row_max, row_sum = attend(
            query_low, query_high, output_low, output_high, row_max, row_sum,
            key, key_scale, key_zero, value, value_scale, value_zero,
            first, whole, last, scale_log2, stride_key_token, stride_value_token, head, num_heads,
            HEAD_DIM, BLOCK_D, BLOCK_N, FORMAT, False, STAGES,
        )  # fmt: skip
    output_low, output_high, row_max, row_sum = attend(
        query_low, query_high, output_low, output_high, row_max, row_sum,
        key, key_scale, key_zero, value, value_scale, value_zero,
        whole, last, last, scale_log2, stride_key_token, stride_value_token, head, num_heads,
        HEAD_DIM, BLOCK_D, BLOCK_N, FORMAT, True, 1 if REMAINDER else STAGES,
    )  # fmt: skip
    # rows of an empty context are zeros, their log-sum-exp minus infinity
    divisor = tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    return output_low / divisor, output_high / divisor, log_sum(row_max, row_sum)


@triton.jit
def store_output(
    output, rows, low, high, valid,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Store what `attend_context` gives, in the type of `output`."""
    PART: tl.constexpr = HEAD_DIM // 2 if FORMAT == 4 else HEAD_DIM
    store_rows(output, rows, narrow(low, output.dtype.element_ty), valid, PART, BLOCK_D)
    if FORMAT == 4:
        store_rows(output + PART, rows, narrow(high, output.dtype.element_ty), valid, PART, BLOCK_D)
