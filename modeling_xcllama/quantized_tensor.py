"""Tensors in 8 or 4 bits with their scales and outliers: the one home of the quantized format."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# channels that share a scale where a head is wider
GROUP = 64
# values of a group that are kept in 16 bit, and the codes at their places
NUM_OUTLIERS = 2
OUTLIER_CODES = {8: (-128, 127), 4: (14, 15)}
# finite, and in the normal range of float16
SMALLEST, LARGEST = 2.0**-14, 65504.0
# share of groups with more outliers than are kept from which on that is said
LOST_SHARE = 0.01


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor `[num_tokens, heads, dim]` in 8 or 4 bits, dequantized on demand.

    The two values of a group that widen its range the most, as massive activations and outlier channels do, are kept
    in float16; two codes say where they stand.

    int8, symmetric, a group a head: `data` int8 `[num_tokens, heads, dim]`, codes -126 to 126, -128 and 127 at the
    outliers; `scale` float16 `[num_tokens, heads, 3]`: the factor of the codes and both outliers; no `zero`.
    int4, asymmetric, in groups of `min(dim, 64)` channels: `data` uint8 `[num_tokens, heads, dim // 2]` with channel j
    in the low nibble and channel j + dim / 2 in the high nibble of byte j, codes 0 to 13, 14 and 15 at the outliers;
    `scale` float16 `[num_tokens, heads, dim // group, 3]`, `zero` without the last dimension, value = code * scale +
    zero.
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
        """Bytes of data, scales, outliers and zeros."""
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
        codes = self.data
        if self.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), dim=-1)
        grouped = codes.unflatten(-1, (-1, codes.shape[-1] // _num_groups(self.scale, self.bits)))
        scale, first, second = self.scale.float().reshape(*grouped.shape[:-1], 3, 1).unbind(-2)
        values = grouped.float() * scale
        if self.zero is not None:
            values = values + self.zero.float().unsqueeze(-1)
        low, high = OUTLIER_CODES[self.bits]
        values = torch.where(grouped == low, first, torch.where(grouped == high, second, values))
        return values.flatten(-2).to(dtype)

    def check(self, name: str) -> None:
        """Raise a ValueError if the parts do not fit together, or are not finite."""
        dtype, lead = torch.int8 if self.bits == 8 else torch.uint8, self.data.shape[:2]
        if self.data.dtype != dtype or self.data.dim() != 3:
            raise ValueError(f"`{name}` in {self.bits} bits is {self.data.dtype} with {self.data.dim()} dimensions.")
        width = self.shape[-1]
        if self.bits == 4 and width % min(width, GROUP):
            raise ValueError(f"`{name}` has a width of {width}, no multiple of its groups.")
        groups = () if self.bits == 8 else (max(1, width // GROUP),)
        shapes = {"scale": (*lead, *groups, 1 + NUM_OUTLIERS)} | ({"zero": (*lead, *groups)} if groups else {})
        for part, shape in shapes.items():
            tensor = getattr(self, part)
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float16:
                raise ValueError(
                    f"`{name}.{part}` must be float16 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}; states "
                    "that were quantized before outliers were kept are quantized again from 16 bit."
                )
            check_finite(f"{name}.{part}", tensor)


def _num_groups(scale: Tensor, bits: int) -> int:
    return 1 if bits == 8 else scale.shape[-2]


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise a ValueError where `tensor` has NaN or infinite values."""
    # the two ends are enough, NaN propagates to both, and no copy is made
    if tensor.numel() and not torch.stack(torch.aminmax(tensor.detach())).isfinite().all():
        raise ValueError(
            f"`{name}` has NaN or infinite values in {tensor.dtype}; take a wider dtype, or load the model in float32."
        )


def quantize(states: Tensor, bits: int) -> QuantizedTensor:
    """Quantize `states` `[num_tokens, heads, dim]` per token and head (8 bits) or group of channels (4 bits).

    Raises:
        ValueError: values that float16 cannot hold, or a width that int4 cannot pack.
    """
    states, width = states.float(), states.shape[-1]
    if bits == 4 and (width % 2 or width % min(width, GROUP)):
        raise ValueError(f"int4 needs an even head width (a multiple of {GROUP} above {GROUP}), got {width}.")
    if states.numel() and not (largest := max(map(abs, states.aminmax()))) <= LARGEST:
        raise ValueError(f"{bits}-bit states must lie within {LARGEST:g}, got {largest:g}; keep 16 bits.")
    grouped = states.unflatten(-1, (-1, width if bits == 8 else min(width, GROUP)))
    places = _outlier_places(grouped, symmetric=bits == 8)
    rest = torch.zeros_like(grouped, dtype=torch.bool).scatter(-1, places, True).logical_not()
    low, high = OUTLIER_CODES[bits]
    if bits == 8:
        zero = None
        scale = _float16(grouped.abs().where(rest, 0).amax(-1, keepdim=True) / 126)
        codes = (grouped / scale.float()).round().clamp(-126, 126)
    else:
        zero = grouped.where(rest, torch.inf).amin(-1, keepdim=True).clamp(-LARGEST, LARGEST).to(torch.float16)
        top = grouped.where(rest, -torch.inf).amax(-1, keepdim=True)
        # a group of outliers alone has no range
        scale = _float16((top - zero.float()).clamp(min=0) / 13)
        codes = ((grouped - zero.float()) / scale.float()).round().clamp(0, 13)
    values = codes * scale.float() + (0 if zero is None else zero.float())
    _warn_of_lost(grouped, values.where(rest, grouped))
    marks = torch.tensor([low, high], dtype=codes.dtype, device=codes.device)[: places.shape[-1]]
    codes = codes.scatter(-1, places, marks.expand_as(places)).flatten(-2)
    outliers = torch.zeros(*grouped.shape[:-1], NUM_OUTLIERS, dtype=torch.float16, device=states.device)
    outliers[..., : places.shape[-1]] = grouped.gather(-1, places).to(torch.float16)
    scale = torch.cat([scale, outliers], dim=-1)
    if bits == 8:
        return QuantizedTensor(codes.to(torch.int8), scale.squeeze(-2))
    first, second = codes.to(torch.uint8).chunk(2, dim=-1)
    return QuantizedTensor(first | (second << 4), scale, zero.squeeze(-1))


def _warn_of_lost(grouped: Tensor, values: Tensor) -> None:
    """Say where more values stand out than are kept: most of those beside them are rounded away."""
    lost = (values - grouped).abs().median(-1).values > 0.5 * grouped.abs().median(-1).values
    if lost.numel() and (share := lost.float().mean().item()) > LOST_SHARE:
        logger.warning(
            f"{100 * share:.0f} % of the groups have more than {NUM_OUTLIERS} outliers, beside which other values are "
            "rounded away: keep these states in 16 bit."
        )


def _float16(scale: Tensor) -> Tensor:
    return scale.clamp(SMALLEST, LARGEST).to(torch.float16)


def _outlier_places(grouped: Tensor, symmetric: bool) -> Tensor:
    """The two places of each group (fewer in a group of one) without which its range is the smallest."""
    count = min(NUM_OUTLIERS, grouped.shape[-1])
    if symmetric:
        return grouped.abs().topk(count, dim=-1).indices
    most = min(NUM_OUTLIERS + 1, grouped.shape[-1])
    top, bottom = grouped.topk(most, dim=-1), grouped.topk(most, dim=-1, largest=False)
    if most <= NUM_OUTLIERS:
        return top.indices
    # without the two highest, the highest and the lowest, the two lowest
    ranges = torch.stack([top.values[..., 2 - n] - bottom.values[..., n] for n in range(3)], dim=-1)
    ends = torch.stack([top.indices[..., 0], bottom.indices[..., 0]], dim=-1)
    pairs = [top.indices[..., :2], ends, bottom.indices[..., :2]]
    chosen = ranges.argmin(-1)[..., None, None].expand(*grouped.shape[:-1], 1, 2)
    return torch.stack(pairs, dim=-2).gather(-2, chosen).squeeze(-2)


def quantization_heads(width: int) -> int:
    """Groups that hidden states are quantized in: 64 channels each where 64 divides the width."""
    return width // GROUP if width % GROUP == 0 else 1


def map_state(state: "Tensor | QuantizedTensor", function: Callable[[Tensor], Tensor]) -> "Tensor | QuantizedTensor":
    """Apply `function` to a tensor, or to every stored tensor of a quantized one."""
    return function(state) if isinstance(state, Tensor) else state.map(function)


def cat_states(states: list) -> "Tensor | QuantizedTensor":
    """Concatenate states of one kind along the tokens."""
    if isinstance(states[0], Tensor):
        return torch.cat(states)
    return QuantizedTensor(*(torch.cat(parts) for parts in zip(*(state.tensors() for state in states), strict=True)))
