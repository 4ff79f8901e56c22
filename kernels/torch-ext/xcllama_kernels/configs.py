"""Tile configurations: the first of a list is the default, the others are what `benchmark.py --tune` times."""

import torch

from .launch import Config, Target


def forward_configs(target: Target, dtype: torch.dtype, head_dim: int, bits: int) -> list[Config]:
    """Candidates of `forward_kernel`."""
    return [Config(64, 64, 4, 2)]


def decode_configs(target: Target, dtype: torch.dtype, head_dim: int, bits: int, block_m: int) -> list[Config]:
    """Candidates of `decode_kernel` for `block_m` rows."""
    return [Config(block_m, 64, 4, 2)]


def query_gradient_configs(target: Target, dtype: torch.dtype, head_dim: int) -> list[Config]:
    """Candidates of `query_gradient_kernel`."""
    return [Config(64, 64, 4, 2)]


def context_gradient_configs(target: Target, dtype: torch.dtype, head_dim: int) -> list[Config]:
    """Candidates of `context_gradient_kernel`."""
    return [Config(32, 64, 4, 2)]


def projection_configs(target: Target, dtype: torch.dtype, bits: int) -> list[Config]:
    """Candidates of `project_kernel`."""
    return [Config(64, 64, 4, 2)]
