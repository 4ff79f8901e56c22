"""Products of 16-bit weights on a CPU that has no 16-bit products: in float32 where they have rows enough.

Emulated, a product of many rows takes several times as long as in float32. A product of one row waits for its weights,
and reads half as many bytes in 16 bits: it stays as it is. Loaded in float32, a model has no such products at all.
"""

import os
import platform
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

logger = logging.get_logger(__name__)

HALF = (torch.bfloat16, torch.float16)
# rows from which on widening the weights costs less than emulated products
MANY_ROWS = 5
ATTENTION = (functional.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__)
# "auto" (default), "always", "never"
VARIABLE = "XCLLAMA_WIDE_PRODUCTS"


@cache
def has_native_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` by instructions of its own, as oneDNN is allowed to use it."""
    if dtype not in HALF:
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    if dtype == torch.float16 or platform.machine() not in ("x86_64", "AMD64"):
        return getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
    # oneDNN emulates bfloat16 where there is AVX-512 without it
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if allowed not in ("ALL", "DEFAULT") and "BF16" not in allowed and "AMX" not in allowed:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def _is_wide(dtype: torch.dtype, choice: str) -> bool:
    if choice not in ("auto", "always", "never"):
        raise ValueError(f"`{VARIABLE}` must be auto, always or never, got {choice!r}.")
    wide = dtype in HALF and (choice == "always" or choice == "auto" and not has_native_products(dtype))
    if wide and choice == "auto":
        logger.info(
            f"this CPU has no products of {str(dtype).removeprefix('torch.')}: those of {MANY_ROWS} rows and more run "
            f"in float32 ({VARIABLE}=never: they do not)"
        )
    return wide


def wide_products(weight: Tensor, num_rows: int = MANY_ROWS) -> AbstractContextManager:
    """Within it this thread's products of `weight`'s dtype run in float32, where the CPU has none of that dtype.

    Args:
        weight: any weight of the model.
        num_rows: tokens of the call; for few of them nothing is to be gained.
    """
    few = num_rows < MANY_ROWS or weight.device.type != "cpu" or torch.compiler.is_compiling()
    return nullcontext() if few or not _is_wide(weight.dtype, os.environ.get(VARIABLE, "auto")) else WideProducts()


class WideProducts(TorchFunctionMode):
    """Linear layers and attention of 16-bit tensors in float32, as far as this thread calls them.

    Flash attention stays: what it reads in 16 bits it multiplies in float32 itself.
    """

    def __init__(self):
        super().__init__()
        self._buffer = torch.empty(0)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is functional.linear and _many_rows(args[0]) and type(args[1]) in (Tensor, Parameter):
            return self._linear(*args, **kwargs)
        if function in ATTENTION and _many_rows(args[0]):
            arguments = [_float(value) for value in args]
            keywords = {name: _float(value) for name, value in kwargs.items()}
            return function(*arguments, **keywords).to(args[0].dtype)
        return function(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        wide = self._widened(weight)
        return functional.linear(input.float(), wide, _float(bias)).to(input.dtype)

    def _widened(self, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            # a backward may read it later
            return weight.float()
        if self._buffer.numel() < weight.numel():
            self._buffer = torch.empty(weight.numel())
        return self._buffer[: weight.numel()].view(weight.shape).copy_(weight)


def _many_rows(tensor: Tensor) -> bool:
    return tensor.dtype in HALF and tensor.numel() >= MANY_ROWS * tensor.shape[-1] and type(tensor) is Tensor


def _float(value):
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
