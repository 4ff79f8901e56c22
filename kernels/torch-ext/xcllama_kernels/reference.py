"""What the kernels compute, in plain torch: the oracle of their tests, and the two quantized formats.

int8 is symmetric: `data` int8 `[num_tokens, heads, dim]`, `scale` float16 `[num_tokens, heads]`, x = data * scale.
int4 is asymmetric in groups of min(dim, 64) channels: `data` uint8 `[num_tokens, heads, dim // 2]`, whose byte j holds
channel j in the low nibble and channel j + dim / 2 in the high one; `scale` and `zero` float16
`[num_tokens, heads, dim // group]`, x = q * scale + zero.
"""

import math

import torch
from torch import Tensor


def int4_group(dim: int) -> int:
    """Channels that share one int4 scale and zero."""
    return min(dim, 64)


def _float16(name: str, tensor: Tensor) -> Tensor:
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"`{name}` must be finite in float16, got {tensor.abs().max().item():.3g}; scale the states.")
    return half


def quantize_int8(states: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale a token and head.

    Args:
        states: `[num_tokens, heads, dim]`, any float dtype, finite.

    Returns:
        `data` int8 of the same shape and `scale` float16 `[num_tokens, heads]`.
    """
    states = states.float()
    scale = _float16("scale", states.abs().amax(-1) / 127)
    divisor = scale.float().where(scale > 0, torch.ones((), device=scale.device))
    return (states / divisor[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantize_int8(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The states that `quantize_int8` stands for, `[num_tokens, heads, dim]`."""
    return (data.float() * scale.float()[..., None]).to(dtype)


def quantize_int4(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric int4 in groups of `int4_group(dim)` channels.

    Args:
        states: `[num_tokens, heads, dim]`, any float dtype, finite; dim even and a multiple of its group.

    Returns:
        `data` uint8 `[num_tokens, heads, dim // 2]`, `scale` and `zero` float16 `[num_tokens, heads, dim // group]`.
    """
    dim = states.shape[-1]
    group = int4_group(dim)
    if dim % 2 or dim % group:
        raise ValueError(f"int4 needs an even dim of at most 64 or a multiple of 64, got {dim}; use int8.")
    grouped = states.float().unflatten(-1, (dim // group, group))
    zero = _float16("zero", grouped.amin(-1))
    scale = _float16("scale", (grouped.amax(-1) - zero.float()).clamp_min(0) / 15)
    divisor = scale.float().where(scale > 0, torch.ones((), device=scale.device))
    levels = ((grouped - zero.float()[..., None]) / divisor[..., None]).round().clamp(0, 15)
    low, high = levels.flatten(-2).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4), scale, zero


def dequantize_int4(data: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The states that `quantize_int4` stands for, `[num_tokens, heads, dim]`."""
    levels = torch.cat([data & 15, data >> 4], dim=-1).float().unflatten(-1, (scale.shape[-1], -1))
    return (levels * scale.float()[..., None] + zero.float()[..., None]).flatten(-2).to(dtype)


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
