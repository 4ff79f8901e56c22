"""Fast decoding on a CPU: compiled steps over a static cache."""

from collections.abc import Callable

from transformers import CompileConfig


def decoding_compile_config(backend: str | Callable = "inductor") -> CompileConfig:
    """Options that compile the decoding steps of `generate` on any device, CPUs included.

    `model.generate(..., cache_implementation="static", compile_config=decoding_compile_config())`: the first token is
    not compiled, the steps after it are, once for the first context length and once for all others. Compiled code is
    kept on disk (`TORCHINDUCTOR_CACHE_DIR`), so that another process only has to trace.

    Args:
        backend: of `torch.compile`.
    """
    config = CompileConfig(backend=backend, mode="default")
    # transformers compiles on GPUs only, unless told so
    config._compile_all_devices = True
    return config
