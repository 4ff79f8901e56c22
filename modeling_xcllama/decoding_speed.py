"""Fast decoding on a CPU: matrix-vector products that read a weight once, and compiled steps over a static cache."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import CompileConfig

_lock = threading.Lock()
_state = {"running": 0, "before": True}


@contextmanager
def _without_onednn() -> Iterator[None]:
    # the switch belongs to the process: the first thread in turns it off, the last one out puts it back
    with _lock:
        if _state["running"] == 0:
            _state["before"] = torch.backends.mkldnn.enabled
            torch.backends.mkldnn.enabled = False
        _state["running"] += 1
    try:
        yield
    finally:
        with _lock:
            _state["running"] -= 1
            if _state["running"] == 0:
                torch.backends.mkldnn.enabled = _state["before"]


@contextmanager
def onednn_products() -> Iterator[None]:
    """Within `decoding_products`, products that oneDNN does better: those of more than one row."""
    with _lock:
        if _state["running"]:
            torch.backends.mkldnn.enabled = _state["before"]
    try:
        yield
    finally:
        with _lock:
            if _state["running"]:
                torch.backends.mkldnn.enabled = False


def decoding_products(tokens: Tensor, weight: Tensor) -> AbstractContextManager:
    """Where one bfloat16 token is decoded on a CPU, let torch's own matrix-vector kernel do the products.

    oneDNN reorders the weight at every product, which takes twice as long as reading it.

    Args:
        tokens: ids `[batch, length]` or embeddings `[batch, length, hidden]` of the step.
        weight: any weight of the decoder.
    """
    one = tokens.shape[0] * tokens.shape[1] == 1
    if one and weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not torch.compiler.is_compiling():
        return _without_onednn()
    return nullcontext()


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
