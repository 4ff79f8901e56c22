"""Tile configurations: the first of a list is the default, the others are what `benchmark.py --tune` times.

Chosen so that nothing spills and shared memory fits on sm_80, sm_90, sm_100 and gfx942: `inspect_kernels.py` checks
bf16 at heads of 64 and 128, the others on demand. float32 products run on the plain units (exact), so their tiles are
small.
"""

import torch

from .launch import Config, Target


def _size(head_dim: int) -> int:
    """The class of a head size: 64, 128 or 256."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def family(target: Target) -> str:
    """Chips that share configurations: "cdna", "ampere", "hopper" or "blackwell"."""
    if target.backend == "hip":
        return "cdna"
    # consumer Blackwell has the instructions and the shared memory of Ampere
    return "ampere" if target.arch < 90 or target.arch >= 120 else "hopper" if target.arch < 100 else "blackwell"


def forward_configs(target: Target, dtype: torch.dtype, head_dim: int, bits: int) -> list[Config]:
    """Candidates of `forward_kernel`."""
    size, chip = _size(head_dim), family(target)
    if dtype == torch.float32:
        warps = 4 if chip == "cdna" else 8
        return [{64: Config(64, 16, 8, 1), 128: Config(16, 32, 4, 1), 256: Config(16, 16, warps, 1)}[size]]
    if chip == "cdna":
        return {
            64: [Config(128, 64, 4, 2), Config(64, 64, 4, 2)][bits == 4 :],
            128: [Config(128, 64, 4, 1), Config(64, 64, 4, 1)][bits == 4 :],
            256: [Config(64, 32, 4, 1)],
        }[size]
    if size == 256 and chip != "blackwell" and (bits == 4 or (bits and chip == "ampere")):
        return [Config(32, 32, 4, 1)]
    if bits and chip == "ampere":
        return [Config(32 if bits == 4 and size == 128 else 64, 32, 4, 2)]
    if size == 64:
        if bits:
            return [Config(128, 64, 8, 2 if chip == "blackwell" else 3)]
        return [Config(128, 64, 8, 3), Config(64, 32, 4, 3)]
    if size == 128:
        if chip == "ampere":
            return [Config(128, 32, 8, 3), Config(64, 32, 4, 2)]
        return [Config(128, 64, 8, 2), Config(64, 64, 4, 2)]
    return [Config(64, 32, 8, 2)] if chip == "ampere" else [Config(64, 32, 8, 1)]


def decode_rows(dtype: torch.dtype, head_dim: int) -> int:
    """Most rows of a decode tile."""
    size = _size(head_dim)
    return {64: 32, 128: 16, 256: 16}[size] if dtype == torch.float32 else {64: 128, 128: 128, 256: 64}[size]


def decode_configs(target: Target, dtype: torch.dtype, head_dim: int, bits: int, block_m: int) -> list[Config]:
    """Candidates of `decode_kernel` for `block_m` rows."""
    size, chip = _size(head_dim), family(target)
    # quantized keys and values spill a little with four warps on Hopper
    crowded = chip == "hopper" and (block_m, size, bits) in ((32, 64, 8), (64, 128, 4))
    warps = 8 if block_m == 128 or crowded else 4
    if dtype == torch.float32:
        if size == 64:
            return [Config(block_m, 32, 8 if block_m == 32 and chip in ("hopper", "blackwell") else 4, 1)]
        return [Config(block_m, 16, 8 if size == 256 and bits == 4 and chip == "hopper" else 4, 1)]
    if chip == "cdna":
        return [Config(block_m, 64 if size < 256 and block_m < 128 else 32, 4, 2 if size < 256 else 1)]
    if size == 256 and bits:
        # ptxas spills a little on Blackwell to keep a third program resident
        if chip == "blackwell":
            return [Config(block_m, 16, 8 if block_m == 32 else 4, 2 if block_m == 16 else 1)]
        return [Config(block_m, 16, 8 if block_m >= 64 else 4, 1)]
    if (size, bits, chip) == (128, 8, "blackwell") and block_m in (16, 128):
        # the other number of warps spills a little in fp16
        return [Config(block_m, 32, 8 if block_m == 16 else 4, 2)]
    if (size, chip) == (128, "ampere") and (block_m == 128 and bits or block_m == 64 and bits == 4):
        return [Config(block_m, 16, 8, 2)]
    if (size, block_m, bits) == (64, 32, 4) or (chip, size, block_m, bits) == ("blackwell", 64, 128, 8):
        return [Config(block_m, 32, warps, 3)]
    if size == 256 or (bits and (size == 128 or chip == "ampere") and chip != "hopper"):
        return [Config(block_m, 32, 8 if block_m >= 64 else 4, 2)]
    default = Config(block_m, 64, warps, 3)
    return [default] if chip == "blackwell" else [default, Config(block_m, 32, warps, 4)]


def query_gradient_configs(target: Target, dtype: torch.dtype, head_dim: int) -> list[Config]:
    """Candidates of `query_gradient_kernel`."""
    size, chip = _size(head_dim), family(target)
    if dtype == torch.float32:
        return [Config(32, 16, 4, 1) if size == 64 else Config(16, 16, 8, 1)]
    if chip == "cdna":
        return {64: [Config(64, 64, 4, 1)], 128: [Config(64, 32, 4, 1)], 256: [Config(32, 32, 4, 1)]}[size]
    if size == 64:
        return [Config(64, 64, 4, 2), Config(128, 64, 8, 2)]
    if size == 128:
        return [Config(64, 32, 4, 2)] if chip == "ampere" else [Config(64, 64, 4, 2), Config(64, 32, 4, 2)]
    return [Config(64, 32, 8, 1)] if chip == "ampere" else [Config(32, 32, 4, 1)]


def context_gradient_configs(target: Target, dtype: torch.dtype, head_dim: int) -> list[Config]:
    """Candidates of `context_gradient_kernel`; `block_n` tokens are held, `block_m` query rows stream past."""
    size, chip = _size(head_dim), family(target)
    if dtype == torch.float32:
        # gfx942 has twice the registers a thread in programs of four warps
        many_registers = size == 256 and chip == "cdna"
        return [Config(16, 32, 4, 1) if size == 64 else Config(16, 16, 4 if many_registers else 8, 1)]
    if chip == "cdna":
        return {64: [Config(64, 64, 4, 1)], 128: [Config(32, 64, 4, 1)], 256: [Config(32, 32, 4, 1)]}[size]
    if size == 64:
        # 64 query rows spill a little on Blackwell
        return [Config(32, 64, 4, 2)] if chip == "blackwell" else [Config(64, 64, 4, 2), Config(32, 64, 4, 2)]
    if size == 128:
        return [Config(64, 64, 8, 2)] if chip == "ampere" else [Config(32, 64, 4, 2), Config(64, 64, 8, 2)]
    return [Config(32, 32, 8, 1)]


def projection_configs(target: Target, dtype: torch.dtype, bits: int) -> list[Config]:
    """Candidates of `project_kernel`."""
    if dtype == torch.float32:
        return [Config(32, 32, 8, 1)]
    if family(target) == "cdna":
        return [Config(128, 64, 4, 2), Config(64, 64, 4, 2)]
    # the second spills a little
    crowded = (bits, family(target)) in ((8, "hopper"), (4, "blackwell"))
    return [Config(128, 128, 8, 3)] if crowded else [Config(128, 128, 8, 3), Config(128, 64, 4, 3)]
