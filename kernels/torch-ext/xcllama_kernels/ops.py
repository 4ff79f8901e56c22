"""The kernels as torch.library operators: checks, dispatch, fake implementations, autograd.

The operators live under the name this package was loaded by, so that an installed copy and one from the Hub can be
loaded in the same process.
"""

import re

import torch
from torch import Tensor

from .backward import plan_backward
from .checks import check_attention, check_attention_shapes, check_projection
from .configs import decode_rows
from .decode import plan_decode
from .forward import plan_forward
from .launch import Quantization, inner_contiguous
from .project import plan_projection

NAMESPACE = re.sub(r"\W", "_", __package__)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::cross_attention", mutates_args=())
def cross_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    context_index: Tensor,
    scale: float,
    key_scale: Tensor | None,
    key_zero: Tensor | None,
    value_scale: Tensor | None,
    value_zero: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(output, lse)` by the decode kernels for short queries, by the forward kernel otherwise."""
    quantization = Quantization(key_scale, key_zero, value_scale, value_zero)
    check_attention(query, key, value, offsets, context_index, quantization)
    batch, query_len, num_heads, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, num_heads, query_len, dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output, lse
    # short queries split the context, long ones are split themselves
    packed_rows = query_len * (num_heads // key.shape[1])
    plan = plan_decode if packed_rows <= decode_rows(query.dtype, query.shape[3]) // 2 else plan_forward
    launches = plan(
        inner_contiguous(query),
        inner_contiguous(key),
        inner_contiguous(value),
        Quantization(*map(_dense, quantization)),
        offsets.contiguous(),
        context_index.contiguous(),
        output,
        lse,
        scale,
    )
    for launch in launches:
        launch.run()
    return output, lse


@cross_attention_op.register_fake
def _(query, key, value, offsets, context_index, scale, *quantization):
    check_attention_shapes(query, key, value, offsets, context_index, Quantization(*quantization))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return output, query.new_empty(query.shape[0], query.shape[2], query.shape[1], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::cross_attention_backward", mutates_args=())
def cross_attention_backward_op(
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
    context_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the last two are empty tensors unless `context_gradients`."""
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # tokens outside every context get no gradient, so no program writes them
    shape = key.shape if context_gradients else (0,)
    grad_key = torch.zeros(shape, dtype=key.dtype, device=key.device)
    grad_value = torch.zeros(shape, dtype=value.dtype, device=value.device)
    if output.numel() == 0:
        return grad_query, grad_key, grad_value
    launches = plan_backward(
        inner_contiguous(grad_output),
        None if grad_lse is None else grad_lse.contiguous(),
        inner_contiguous(query),
        inner_contiguous(key),
        inner_contiguous(value),
        offsets.contiguous(),
        context_index.contiguous(),
        output,
        lse,
        scale,
        (grad_query, grad_key, grad_value) if context_gradients else (grad_query,),
    )
    for launch in launches:
        launch.run()
    return grad_query, grad_key, grad_value


@cross_attention_backward_op.register_fake
def _(
    grad_output, grad_lse, query, key, value, offsets, context_index, output, lse, scale, context_gradients
):  # fmt: skip
    shape = key.shape if context_gradients else (0,)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return grad_query, key.new_empty(shape), value.new_empty(shape)


def _setup_context(ctx, inputs, output):
    query, key, value, offsets, context_index, scale, key_scale, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.quantized = key_scale is not None
    ctx.scale = scale
    ctx.save_for_backward(query, key, value, offsets, context_index, *output)


def _backward(ctx, grad_output, grad_lse):
    if ctx.quantized:
        raise ValueError("quantized keys and values have no gradient, got a backward pass; dequantize them first.")
    query, key, value, offsets, context_index, output, lse = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    context_gradients = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    grad_query, grad_key, grad_value = cross_attention_backward_op(
        grad_output, grad_lse, query, key, value, offsets, context_index, output, lse, ctx.scale, context_gradients
    )
    grads = (grad_query, grad_key, grad_value) if context_gradients else (grad_query, None, None)
    return (*grads, None, None, None, None, None, None, None)


cross_attention_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(f"{NAMESPACE}::project_quantized", mutates_args=())
def project_quantized_op(
    states: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float | None,
) -> Tensor:
    """Dequantize, norm and project in one pass; see `functional.project_quantized`."""
    check_projection(states, scale, zero, weight, bias, norm_weight, norm_eps)
    output = torch.empty(states.shape[0], weight.shape[0], dtype=weight.dtype, device=weight.device)
    rows_dense = states.stride(2) == 1 and (states.shape[1] == 1 or states.stride(1) == states.shape[2])
    launches = plan_projection(
        states if rows_dense else states.contiguous(),
        scale.contiguous(),
        _dense(zero),
        inner_contiguous(weight),
        _dense(bias),
        _dense(norm_weight),
        norm_eps,
        output,
    )
    for launch in launches:
        launch.run()
    return output


@project_quantized_op.register_fake
def _(states, scale, zero, weight, bias, norm_weight, norm_eps):
    check_projection(states, scale, zero, weight, bias, norm_weight, norm_eps)
    return weight.new_empty(states.shape[0], weight.shape[0])
