"""What the kernels compute, in plain torch: the oracle of their tests, and the two quantized formats.

Both keep two values of every group of channels, its outliers, in float16 and put codes at their places.

int8 is symmetric, a group a head: `data` int8 `[num_tokens, heads, dim]`, codes -126 to 126, -128 at the first outlier
and 127 at the second; `scale` float16 `[num_tokens, heads, 3]`: the factor of the codes and the outliers.
int4 is asymmetric in groups of min(dim, 64) channels: `data` uint8 `[num_tokens, heads, dim // 2]`, whose byte j holds
channel j in the low nibble and channel j + dim / 2 in the high one, codes 0 to 13, 14 and 15 at the outliers; `scale`
float16 `[num_tokens, heads, dim // group, 3]`, `zero` without the last dimension, x = code * scale + zero.
"""

import math

import torch
from torch import Tensor


def int4_group(dim: int) -> int:
    """Channels that share one int4 scale and zero."""
    return min(dim, 64)


def _values(codes: Tensor, scale: Tensor, zero: Tensor | None, marks: tuple[int, int]) -> Tensor:
    """Values of codes `[..., group]` with scales `[..., 3]`."""
    factor, first, second = scale.float()[..., None].unbind(-2)
    values = codes.float() * factor
    if zero is not None:
        values = values + zero.float()[..., None]
    values = torch.where(codes == marks[0], first, values)
    return torch.where(codes == marks[1], second, values)


def dequantize_int8(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The states that int8 codes stand for, `[num_tokens, heads, dim]`."""
    return _values(data, scale, None, (-128, 127)).to(dtype)


def dequantize_int4(data: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The states that int4 codes stand for, `[num_tokens, heads, dim]`."""
    codes = torch.cat([data & 15, data >> 4], dim=-1).unflatten(-1, (scale.shape[-2], -1))
    return _values(codes, scale, zero, (14, 15)).flatten(-2).to(dtype)


def dequantize(data: Tensor, scale: Tensor | None, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`data` in `dtype`, whichever of the three formats it is in."""
    if scale is None:
        return data.to(dtype)
    return dequantize_int8(data, scale, dtype) if zero is None else dequantize_int4(data, scale, zero, dtype)


def cross_attention_reference(
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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """`cross_attention_with_lse`, a row at a time in `dtype`, differentiable by autograd."""
    num_heads, head_dim = query.shape[2:]
    group = num_heads // key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    keys = dequantize(key, key_scale, key_zero, dtype)
    values = dequantize(value, value_scale, value_zero, dtype)
    outputs, lses = [], []
    for row, context in enumerate(context_index.tolist()):
        start, end = offsets[context : context + 2].tolist()
        if start == end:
            outputs.append(torch.zeros(query.shape[1:], dtype=dtype, device=query.device))
            lses.append(torch.full((num_heads, query.shape[1]), -math.inf, dtype=dtype, device=query.device))
            continue
        row_keys = keys[start:end].repeat_interleave(group, dim=1)
        row_values = values[start:end].repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,nhd->hqn", query[row].to(dtype), row_keys) * scale
        outputs.append(torch.einsum("hqn,nhd->qhd", scores.softmax(-1), row_values))
        lses.append(scores.logsumexp(-1))
    return torch.stack(outputs), torch.stack(lses)


def project_quantized_reference(
    states: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`project_quantized` in `dtype`."""
    hidden = dequantize(states, scale, zero, dtype).flatten(1)
    if norm_weight is not None:
        hidden = hidden * (hidden.pow(2).mean(-1, keepdim=True) + norm_eps).rsqrt() * norm_weight.to(dtype)
    return torch.nn.functional.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
