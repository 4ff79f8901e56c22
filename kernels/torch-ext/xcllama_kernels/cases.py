"""Random inputs of the kernels, for tests and benchmarks."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .reference import int4_group


def random_quantized(
    num_tokens: int,
    heads: int,
    dim: int,
    bits: int,
    generator: torch.Generator | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Data, scale and zero (None for int8) of random states near the unit Gaussian, with outliers."""
    drawn = {"generator": generator, "device": device}

    def codes(low: int, high: int, *shape: int) -> Tensor:
        values = torch.randint(low, high + 1, shape, dtype=torch.int16, **drawn)
        # one outlier of each kind, which the second may overwrite
        for code in (14, 15) if bits == 4 else (-128, 127):
            values = values.scatter(-1, torch.randint(0, shape[-1], (*shape[:-1], 1), **drawn), code)
        return values

    groups = (dim // int4_group(dim),) if bits == 4 else ()
    factors = (1 + torch.rand(num_tokens, heads, *groups, 1, **drawn)) / (4 if bits == 4 else 100)
    outliers = 20 * torch.randn(num_tokens, heads, *groups, 2, **drawn)
    scale = torch.cat([factors, outliers], dim=-1).to(torch.float16)
    if bits == 8:
        return codes(-126, 126, num_tokens, heads, dim).to(torch.int8), scale, None
    zero = -2 * torch.rand(num_tokens, heads, *groups, **drawn)
    first, second = codes(0, 13, num_tokens, heads, *groups, int4_group(dim)).flatten(2).to(torch.uint8).chunk(2, -1)
    return first | (second << 4), scale, zero.to(torch.float16)


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
    """Gaussian query, key and value over contexts of these `lengths`; with `bits` 8 or 4 the last two are codes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    query = random(len(context_index), query_len, num_heads, head_dim).to(dtype)
    quantization = {}
    if bits:
        shape = sum(lengths), num_kv_heads, head_dim, bits, generator
        stored = {"key": random_quantized(*shape), "value": random_quantized(*shape)}
        key, value = (parts[0].to(device) for parts in stored.values())
        for name, (_, scale, zero) in stored.items():
            quantization[f"{name}_scale"] = scale.to(device)
            if zero is not None:
                quantization[f"{name}_zero"] = zero.to(device)
    else:
        key, value = (random(sum(lengths), num_kv_heads, head_dim).to(dtype) for _ in range(2))
    index = torch.tensor(context_index, dtype=torch.int32, device=device)
    return Case(query, key, value, offsets, index, quantization)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in float64; not-a-number when anything is."""
    difference = (result.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
