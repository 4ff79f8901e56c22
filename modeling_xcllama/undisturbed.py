"""Encoding that leaves the module and the process as they are: other threads train or generate with them meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

# attention whose dropout is an argument of torch's functions
PLAIN_ATTENTION = (None, "eager", "sdpa")


class WithoutDropout(TorchFunctionMode):
    """Torch's functions drop nothing, in this thread alone."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is functional.dropout:
            args, kwargs["training"] = args[:2], False
        elif function is functional.scaled_dot_product_attention:
            # query, key, value and mask; what follows comes by name
            args, kwargs["dropout_p"] = args[:4], 0.0
        return function(*args, **kwargs)


@contextmanager
def evaluation(encoder: nn.Module, config: PreTrainedConfig) -> Iterator[None]:
    """Let modules compute as in evaluation, in this thread alone: no `training` flag is touched.

    Raises:
        ValueError: modules in train mode that draw in other ways than by torch's dropout.
    """
    training = [module for module in encoder.modules() if module.training]
    if not training:
        yield
        return
    drops = any(value for name, value in config.to_dict().items() if "att" in name and "drop" in name)
    other = drops and config._attn_implementation not in PLAIN_ATTENTION
    for module in training:
        other = other or isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "layerdrop", 0)
    if other:
        raise ValueError(
            f"{type(encoder).__name__} in train mode leaves out parts at random that only `eval()` brings back: call "
            "`model.eval()` before contexts are encoded."
        )
    with WithoutDropout():
        yield


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Under `torch.inference_mode`, make tensors that are kept for later such that a backward can use them."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield
