"""Tensors in 8 or 4 bits with their scales: the one home of the quantized format."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor `[num_tokens, heads, dim]` in 8 or 4 bits, dequantized on demand.

    int8, symmetric: `data` int8 `[num_tokens, heads, dim]`, `scale` float16 `[num_tokens, heads]`, no `zero`.
    int4, asymmetric in groups of `min(dim, 64)` channels: `data` uint8 `[num_tokens, heads, dim // 2]` with channel j
    in the low nibble and channel j + dim / 2 in the high nibble of byte j; `scale`, `zero` float16
    `[num_tokens, heads, dim // group]`, value = q * scale + zero.
    """

    data: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.zero is None else 4

    @property
    def shape(self) -> torch.Size:
        """Shape of the dequantized tensor."""
        *lead, last = self.data.shape
        return torch.Size((*lead, last if self.bits == 8 else 2 * last))

    @property
    def device(self) -> torch.device:
        """Device of the data."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of data, scales and zeros."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors: data, scale and, for int4, zero."""
        return (self.data, self.scale) if self.zero is None else (self.data, self.scale, self.zero)

    def map(self, function: Callable[[Tensor], Tensor]) -> "QuantizedTensor":
        """Apply `function` to every stored tensor."""
        return QuantizedTensor(*(function(tensor) for tensor in self.tensors()))

    def __getitem__(self, tokens) -> "QuantizedTensor":
        return self.map(lambda tensor: tensor[tokens])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the values in `dtype`, `[num_tokens, heads, dim]`."""
        if self.zero is None:
            return (self.data.to(torch.float32) * self.scale.float().unsqueeze(-1)).to(dtype)
        values = torch.cat((self.data & 15, self.data >> 4), dim=-1).to(torch.float32)
        grouped = values.unflatten(-1, (self.scale.shape[-1], -1))
        return (
            torch.addcmul(self.zero.float().unsqueeze(-1), grouped, self.scale.float().unsqueeze(-1))
            .flatten(-2)
            .to(dtype)
        )


def quantize(states: Tensor, bits: int) -> QuantizedTensor:
    """Quantize `states` `[num_tokens, heads, dim]` per token and head (8 bits) or group of channels (4 bits).

    Raises:
        ValueError: values that scales and zeros of 16 bit cannot reach.
    """
    states = states.float()
    # 16-bit scales: keep them in the normal range of float16, and finite
    tiny, huge = 2.0**-14, 65504.0
    most = huge * (127 if bits == 8 else 1)
    if states.numel() and not (largest := max(map(abs, states.aminmax()))) <= most:
        raise ValueError(f"{bits}-bit states must lie within {most:g}, got {largest:g}; keep 16 bits.")
    if bits == 8:
        scale = (states.abs().amax(-1) / 127).clamp(tiny, huge).to(torch.float16)
        data = (states / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
        return QuantizedTensor(data, scale)
    grouped = states.unflatten(-1, (-1, min(states.shape[-1], 64)))
    zero = grouped.amin(-1).clamp(-huge, huge).to(torch.float16)
    scale = ((grouped.amax(-1) - zero.float()) / 15).clamp(tiny, huge).to(torch.float16)
    data = ((grouped - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).round().clamp(0, 15)
    low, high = data.flatten(-2).to(torch.uint8).chunk(2, dim=-1)
    return QuantizedTensor(low | (high << 4), scale, zero)


def quantization_heads(width: int) -> int:
    """Groups that hidden states are quantized in: 64 channels each where 64 divides the width."""
    return width // 64 if width % 64 == 0 else 1


def map_state(state: "Tensor | QuantizedTensor", function: Callable[[Tensor], Tensor]) -> "Tensor | QuantizedTensor":
    """Apply `function` to a tensor, or to every stored tensor of a quantized one."""
    return function(state) if isinstance(state, Tensor) else state.map(function)


def cat_states(states: list) -> "Tensor | QuantizedTensor":
    """Concatenate states of one kind along the tokens."""
    if isinstance(states[0], Tensor):
        return torch.cat(states)
    return QuantizedTensor(*(torch.cat(parts) for parts in zip(*(state.tensors() for state in states), strict=True)))
