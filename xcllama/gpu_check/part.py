"""One part of a check, in a process of its own."""

import torch

from xcllama.gpu_check.options import Options


def run_part(part: str, options: Options) -> int:
    """Run `part`; 0 if it did what it should.

    Raises:
        ValueError: no GPU, and no dry run.
    """
    if not (options.dry_run or torch.cuda.is_available()):
        raise ValueError("no GPU is here; `--dry-run` runs everything on tiny sizes on the CPU.")
    if part == "kernels":
        from xcllama.gpu_check.kernels import check_kernels as check
    elif part == "model":
        from xcllama.gpu_check.model import check_model as check
    else:
        from xcllama.gpu_check.train import check_train as check
    return check(options)
