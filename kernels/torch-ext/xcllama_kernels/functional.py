"""The public functions."""

from torch import Tensor

from .ops import cross_attention_op, project_quantized_op


def cross_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    context_index: Tensor,
    *,
    scale: float | None = None,
    key_scale: Tensor | None = None,
    key_zero: Tensor | None = None,
    value_scale: Tensor | None = None,
    value_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`cross_attention`, and the natural logarithm of each row's sum of exponentials.

    Returns:
        The output, and float32 `[batch, num_heads, query_len]`, minus infinity for an empty context: both
        differentiable.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return cross_attention_op(
        query, key, value, offsets, context_index, scale, key_scale, key_zero, value_scale, value_zero
    )


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    context_index: Tensor,
    *,
    scale: float | None = None,
    key_scale: Tensor | None = None,
    key_zero: Tensor | None = None,
    value_scale: Tensor | None = None,
    value_zero: Tensor | None = None,
) -> Tensor:
    """Attend `query` to packed contexts, every token of a row's context visible (no causal mask).

    Differentiable in query, key and value unless these are quantized (formats: see `xcllama_kernels.reference`).

    Args:
        query: `[batch, query_len, num_heads, head_dim]`, float16, bfloat16 or float32; head_dim a multiple of 8 in
            [16, 256].
        key, value: `[num_tokens, num_kv_heads, head_dim]`, contexts back to back, in the dtype of `query`; int8 with
            scales; or uint8 `[num_tokens, num_kv_heads, head_dim // 2]` (int4) with scales and zeros.
        offsets: first token of each context and the end of the last, int32 or int64 `[num_contexts + 1]`.
        context_index: the context of each row, int32 or int64 `[batch]`.
        scale: factor on the scores; None: head_dim ** -0.5.
        key_scale, value_scale: a factor and two outliers, float16 `[num_tokens, num_kv_heads, 3]` (int8) or
            `[num_tokens, num_kv_heads, groups, 3]` (int4).
        key_zero, value_zero: float16 `[num_tokens, num_kv_heads, groups]`, int4 only.

    Returns:
        Same shape and dtype as `query`, dense. Rows of an empty context are zeros.

    Raises:
        ValueError: a shape, dtype, device, offset or index breaks a rule; nothing was launched.
    """
    return cross_attention_with_lse(
        query, key, value, offsets, context_index,
        scale=scale, key_scale=key_scale, key_zero=key_zero, value_scale=value_scale, value_zero=value_zero,
    )[0]  # fmt: skip


def project_quantized(
    states: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
) -> Tensor:
    """Linear projection of quantized hidden states, after an optional RMS-norm; no float copy of the states is made.

    Not differentiable: a quantized cache is read, not trained.

    Args:
        states: int8 `[num_tokens, heads, dim]`, or uint8 `[num_tokens, heads, dim // 2]` (int4); heads * dim is the
            width, dim a multiple of 64 or heads 1 (formats: see `xcllama_kernels.reference`).
        scale: float16 `[num_tokens, heads, 3]` (int8) or `[num_tokens, heads, groups, 3]` (int4).
        zero: float16 `[num_tokens, heads, groups]` for int4, None for int8.
        weight: `[out, width]`, float16, bfloat16 or float32; bias: `[out]`.
        norm_weight: `[width]`, with `norm_eps`: states are divided by their root mean square and multiplied by it.

    Returns:
        `[num_tokens, out]` in the dtype of `weight`.

    Raises:
        ValueError: a shape, dtype or device breaks a rule; nothing was launched.
    """
    return project_quantized_op(states, scale, zero, weight, bias, norm_weight, norm_eps)
