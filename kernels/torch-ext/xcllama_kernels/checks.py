"""Every rule on the inputs, checked before any launch: one function a public operation."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .launch import INTERPRETED, Quantization
from .reference import int4_group

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)

# offsets and indices live through a whole generation: each version of a tensor is read back once
_checked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _require(condition: bool, rule: str, got: object, way_out: str = "") -> None:
    if not condition:
        raise ValueError(f"{rule}, got {got}{'; ' + way_out if way_out else ''}.")


def _check_device(named: dict[str, Tensor | None]) -> None:
    devices = {name: tensor.device for name, tensor in named.items() if tensor is not None}
    _require(
        len(set(devices.values())) == 1,
        "all tensors must be on one device",
        {name: str(device) for name, device in devices.items()},
    )
    device = next(iter(devices.values()))
    _require(
        device.type != "cpu" or INTERPRETED,
        "Triton kernels need tensors on a GPU",
        f"'{device}'",
        "move them, use cross_attn_implementation='sdpa', or set TRITON_INTERPRET=1 before triton is imported",
    )


def _check_states(name: str, data: Tensor, scale: Tensor | None, zero: Tensor | None, dtype: torch.dtype) -> int:
    """Check one of the three formats and return the number of channels of a head."""
    _require(data.dim() == 3, f"`{name}` must be [num_tokens, heads, dim]", tuple(data.shape))
    # token numbers are 32-bit, and the last tile may pass the end
    _require(data.shape[0] <= 2**30, f"`{name}` must have at most 2**30 tokens", data.shape[0])
    if scale is None:
        _require(zero is None, f"`{name}_zero` needs `{name}_scale`", "no scale")
        _require(data.dtype == dtype, f"`{name}` must have the dtype of `query` ({dtype})", data.dtype)
        return data.shape[2]
    _require(scale.dtype == torch.float16, f"`{name}_scale` must be float16", scale.dtype)
    if zero is None:
        _require(data.dtype == torch.int8, f"`{name}` with a scale and no zero must be int8", data.dtype)
        expected = (*data.shape[:2], 3)
        _require(tuple(scale.shape) == expected, f"`{name}_scale` must be {expected}", tuple(scale.shape))
        return data.shape[2]
    _require(data.dtype == torch.uint8, f"`{name}` with a scale and a zero must be uint8 (int4 pairs)", data.dtype)
    dim = 2 * data.shape[2]
    _require(dim % int4_group(dim) == 0, f"`{name}` in int4 needs a dim up to 64 or a multiple of 64", dim, "use int8")
    expected = (*data.shape[:2], dim // int4_group(dim))
    _require(tuple(scale.shape) == (*expected, 3), f"`{name}_scale` must be {(*expected, 3)}", tuple(scale.shape))
    _require(zero.dtype == torch.float16, f"`{name}_zero` must be float16", zero.dtype)
    _require(tuple(zero.shape) == expected, f"`{name}_zero` must be {expected}", tuple(zero.shape))
    return dim


def check_attention_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    context_index: Tensor,
    quantization: Quantization,
) -> None:
    """Shapes, dtypes and devices of `cross_attention`; reads no value, so it holds under tracing."""
    _require(query.dim() == 4, "`query` must be [batch, query_len, num_heads, head_dim]", tuple(query.shape))
    _require(query.dtype in DTYPES, "`query` must be float16, bfloat16 or float32", query.dtype)
    head_dim = query.shape[3]
    _require(16 <= head_dim <= 256 and head_dim % 8 == 0, "head_dim must be a multiple of 8 in [16, 256]", head_dim)
    key_dim = _check_states("key", key, quantization.key_scale, quantization.key_zero, query.dtype)
    value_dim = _check_states("value", value, quantization.value_scale, quantization.value_zero, query.dtype)
    _require(key_dim == head_dim, f"`key` must have the head_dim of `query` ({head_dim})", key_dim)
    _require(value_dim == head_dim, f"`value` must have the head_dim of `query` ({head_dim})", value_dim)
    _require(key.dtype == value.dtype, f"`value` must have the dtype of `key` ({key.dtype})", value.dtype)
    _require(
        key.shape[:2] == value.shape[:2],
        f"`value` must have the tokens and heads of `key` {tuple(key.shape[:2])}",
        tuple(value.shape[:2]),
    )
    num_heads, num_kv_heads = query.shape[2], key.shape[1]
    _require(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        f"num_heads must be a multiple of num_kv_heads ({num_kv_heads})",
        num_heads,
    )
    # the second dimension of a grid
    _require(num_kv_heads < 2**16, "num_kv_heads must be less than 65536", num_kv_heads)
    _require(
        offsets.dim() == 1 and offsets.shape[0] >= 2, "`offsets` must be [num_contexts + 1]", tuple(offsets.shape)
    )
    _require(offsets.dtype in INDEX_DTYPES, "`offsets` must be int32 or int64", offsets.dtype)
    _require(
        tuple(context_index.shape) == (query.shape[0],),
        f"`context_index` must be [batch] = [{query.shape[0]}]",
        tuple(context_index.shape),
    )
    _require(context_index.dtype in INDEX_DTYPES, "`context_index` must be int32 or int64", context_index.dtype)
    tensors = {"query": query, "key": key, "value": value, "offsets": offsets, "context_index": context_index}
    _check_device(tensors | quantization._asdict())


def _is_new(tensor: Tensor, bound: int) -> bool:
    """Whether this version of `tensor` has not been checked against `bound` yet."""
    if tensor.is_inference():
        return True
    state = (tensor._version, bound)
    if _checked.get(tensor) == state:
        return False
    _checked[tensor] = state
    return True


def check_attention_values(offsets: Tensor, context_index: Tensor, num_tokens: int) -> None:
    """Order and range of the offsets and indices; each version of a tensor is read once (a device synchronization).

    During CUDA graph capture nothing can be read: the kernels clamp both, so no access leaves the tensors.
    """
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    num_contexts = offsets.shape[0] - 1
    if _is_new(offsets, num_tokens):
        try:
            _check_offsets(offsets.cpu(), num_tokens)
        except ValueError:
            _checked.pop(offsets, None)
            raise
    if context_index.shape[0] and _is_new(context_index, num_contexts):
        low, high = (int(bound) for bound in context_index.cpu().aminmax())
        if low < 0 or high >= num_contexts:
            _checked.pop(context_index, None)
            wrong = low if low < 0 else high
            raise ValueError(f"`context_index` must lie in [0, {num_contexts - 1}], got {wrong}.")


def _check_offsets(offsets: Tensor, num_tokens: int) -> None:
    decreasing = (offsets[1:] < offsets[:-1]).nonzero()
    if len(decreasing):
        place = int(decreasing[0])
        raise ValueError(
            f"`offsets` must not decrease, got {int(offsets[place])} then {int(offsets[place + 1])} at {place}."
        )
    first, last = int(offsets[0]), int(offsets[-1])
    _require(first >= 0, "`offsets` must start at 0 or later", first)
    _require(last <= num_tokens, f"`offsets` must not pass the end of the tokens ({num_tokens})", last)


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, context_index: Tensor, quantization: Quantization
) -> None:
    """All rules of `cross_attention`.

    Raises:
        ValueError: names the rule, the value and, where there is one, the way out.
    """
    check_attention_shapes(query, key, value, offsets, context_index, quantization)
    check_attention_values(offsets, context_index, key.shape[0])


def check_projection(
    states: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float | None,
) -> None:
    """All rules of `project_quantized`.

    Raises:
        ValueError: names the rule, the value and, where there is one, the way out.
    """
    _require(scale is not None, "`project_quantized` needs a scale", None, "use torch.nn.functional.linear")
    _require(weight.dtype in DTYPES, "`weight` must be float16, bfloat16 or float32", weight.dtype)
    dim = _check_states("states", states, scale, zero, weight.dtype)
    heads = states.shape[1]
    _require(
        dim % 64 == 0 or heads == 1, "`states` must have heads of a multiple of 64 channels, or one head", (heads, dim)
    )
    width = heads * dim
    _require(weight.dim() == 2 and weight.shape[1] == width, f"`weight` must be [out, {width}]", tuple(weight.shape))
    for name, tensor, size in (("bias", bias, weight.shape[0]), ("norm_weight", norm_weight, width)):
        if tensor is not None:
            _require(tuple(tensor.shape) == (size,), f"`{name}` must be [{size}]", tuple(tensor.shape))
            _require(tensor.dtype == weight.dtype, f"`{name}` must have the dtype of `weight`", tensor.dtype)
    _require((norm_weight is None) == (norm_eps is None), "`norm_weight` and `norm_eps` go together", norm_eps)
    tensors = {"states": states, "scale": scale, "zero": zero, "weight": weight}
    _check_device(tensors | {"bias": bias, "norm_weight": norm_weight})
