"""Bytes a context token costs: in the file, resident, and in the decoder's own KV cache."""

import torch
from transformers import PretrainedConfig

from modeling_xcllama import ContextCache, XCLlamaConfig


def cache_bytes(config: XCLlamaConfig, dtype: str = "bfloat16") -> float:
    """Bytes a token of a cache of this model, measured on one: scales included."""
    shape = (1, config.cross_attention_num_key_value_heads, config.cross_attention_head_dim)
    if config.context_layout == "condensed":
        states = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in ("key", "value")}
    else:
        states = {"hidden": torch.zeros(1, config.context_width, dtype=torch.bfloat16)}
    cache = ContextCache(states, (0, 1), torch.zeros(1, dtype=torch.int32), "")
    return (cache if dtype == "bfloat16" else cache.quantize(dtype)).bytes_per_token


def key_value_bytes(config: PretrainedConfig, itemsize: int = 2) -> int:
    """Bytes a token of a decoder's own KV cache, of any family; in 16 bit unless `itemsize` says otherwise."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * itemsize


def projected_bytes(config: XCLlamaConfig) -> int:
    """Bytes a token of the keys and values that a hidden cache becomes in memory, in 16 bit; 0: condensed."""
    if config.context_layout == "condensed":
        return 0
    projections = 1 if config.cross_attention_share_weights else len(config.cross_attention_layers)
    return 2 * projections * config.cross_attention_num_key_value_heads * config.cross_attention_head_dim * 2
