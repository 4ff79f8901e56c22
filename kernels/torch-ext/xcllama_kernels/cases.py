"""Random inputs of the kernels, for tests and benchmarks."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .reference import quantize_int4, quantize_int8


@dataclass(frozen=True)
class Case:
    """Arguments of `cross_attention`; shapes as there."""

    query: Tensor
    key: Tensor
    value: Tensor
    offsets: Tensor
    context_index: Tensor
    quantization: dict[str, Tensor] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.offsets, self.context_index


def random_case(
    lengths: list[int],
    context_index: list[int],
    query_len: int = 1,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    bits: int = 0,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Case:
    """Gaussian query, key and value over contexts of the given `lengths`; `bits` 8 or 4 quantizes key and value."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    query = random(len(context_index), query_len, num_heads, head_dim).to(dtype)
    key, value = (random(sum(lengths), num_kv_heads, head_dim) for _ in range(2))
    quantization = {}
    if bits == 8:
        key, quantization["key_scale"] = quantize_int8(key)
        value, quantization["value_scale"] = quantize_int8(value)
    elif bits == 4:
        key, quantization["key_scale"], quantization["key_zero"] = quantize_int4(key)
        value, quantization["value_scale"], quantization["value_zero"] = quantize_int4(value)
    else:
        key, value = key.to(dtype), value.to(dtype)
    index = torch.tensor(context_index, dtype=torch.int32, device=device)
    return Case(query, key, value, offsets, index, quantization)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in float64; not-a-number when anything is."""
    difference = (result.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
