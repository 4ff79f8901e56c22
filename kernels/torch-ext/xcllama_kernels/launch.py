"""How kernels are launched: targets, tile configurations, and one object that runs a kernel or describes it."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# TRITON_INTERPRET=1 when triton was imported, which its own functions show: kernels run in numpy, on CPU tensors
INTERPRETED: bool = not isinstance(tl.cdiv, triton.JITFunction)

# launches of each kernel in this process, for tests and profiles: `launch_counts["decode_kernel"]`
launch_counts: Counter[str] = Counter()


@dataclass(frozen=True)
class Target:
    """The chip that a configuration is for.

    Args:
        backend: "cuda" or "hip".
        arch: compute capability (80, 90, 100) or the gfx name.
        num_processors: streaming multiprocessors or compute units.
    """

    backend: str
    arch: int | str
    num_processors: int


@dataclass(frozen=True)
class Config:
    """Rows (packed query rows) and columns (context tokens) of a tile, and how a program runs it."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Launch:
    """One kernel launch: everything `triton.compile` or the launcher needs."""

    kernel: object
    grid: tuple[int, ...]
    arguments: dict[str, object]
    config: Config
    constants: dict[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return self.kernel.fn.__name__

    def run(self) -> None:
        """Launch the kernel on the device that holds its tensors; an empty grid is nothing to do."""
        if 0 in self.grid:
            return
        launch_counts[self.name] += 1
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        # triton launches on the current device, whichever holds the tensors
        with torch.cuda.device_of(tensor):
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options())

    def options(self) -> dict[str, int | bool]:
        """Options of the compiler; fusion is stated because its default differs between Triton versions."""
        return {
            "num_warps": self.config.num_warps, "num_stages": self.config.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip


class Quantization(NamedTuple):
    """Scales and zeros of keys and values: none for floats, no zeros for int8."""

    key_scale: Tensor | None = None
    key_zero: Tensor | None = None
    value_scale: Tensor | None = None
    value_zero: Tensor | None = None

    @property
    def bits(self) -> int:
        return data_format(self.key_scale, self.key_zero)


def strides(**tensors: Tensor) -> dict[str, int]:
    """Kernel arguments `stride_NAME_batch` (of query rows only), `stride_NAME_token` and `stride_NAME_head`."""
    names = ("batch", "token", "head")
    return {
        f"stride_{name}_{dimension}": stride
        for name, tensor in tensors.items()
        for dimension, stride in zip(names[4 - tensor.dim() :], tensor.stride(), strict=False)
    }


@cache
def target_of(device: torch.device) -> Target:
    """The target of a device; the interpreter stands for a small sm_90."""
    if device.type != "cuda":
        return Target("cuda", 90, 16)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)


def block_dim(head_dim: int) -> int:
    """Channels of a tile: the power of two that holds a head (or half a head), at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def data_format(scale: Tensor | None, zero: Tensor | None) -> int:
    """Bits of a quantized format (8 or 4), 0 for plain floats."""
    return 0 if scale is None else 8 if zero is None else 4


def inner_contiguous(tensor: Tensor) -> Tensor:
    """`tensor` itself when its last dimension is dense, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
