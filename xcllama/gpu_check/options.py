"""What every part of a check is told."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from xcllama.gpu_check.packing import ready_base
from xcllama.gpu_check.tiny import tiny_base

# code whose change makes a figure of a check old
MEASURED = ("kernels/torch-ext/xcllama_kernels", "modeling_xcllama", "xcllama/gpu_check", "xcllama/training")


@dataclass(frozen=True)
class Options:
    """Options of a part.

    Args:
        output: folder of the results.
        deadline: on `time.monotonic`'s clock; a part has ended by then.
        base: folder of the decoder; None: of a tiny random one.
        data: folder of a token pool; None: a tiny random one.
        dry_run: tiny sizes, on the CPU, kernels in Triton's interpreter.
    """

    output: Path
    deadline: float
    base: Path | None
    data: Path | None
    dry_run: bool

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    @property
    def implementation(self) -> str:
        """The backend to ask for: the kernels must be what "auto" takes on a GPU, and run in the interpreter else."""
        return "triton" if self.dry_run else "auto"

    def decoder(self) -> Path:
        """Folder of the decoder, made where it is not there yet."""
        if self.base is None:
            return tiny_base(self.output / "tiny_base")
        return ready_base(self.base, self.output / "base")


def synchronize(device: torch.device) -> None:
    """Wait for what was launched, so that times are those of finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
