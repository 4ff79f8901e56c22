"""Initial weights of the added modules, taken from the decoder's own self-attention."""

import copy

import torch
from torch import Tensor, nn


def resize_heads(weight: Tensor, num_source: int, num_target: int) -> Tensor:
    """Merge (mean, as in GQA up-training) or repeat heads of a projection `[num_source * head_dim, ...]`.

    Raises:
        ValueError: neither count divides the other.
    """
    heads = weight.unflatten(0, (num_source, -1))
    if num_source % num_target == 0:
        return heads.unflatten(0, (num_target, -1)).mean(1).flatten(0, 1)
    if num_target % num_source == 0:
        return heads.repeat_interleave(num_target // num_source, 0).flatten(0, 1)
    raise ValueError(
        f"init='self_attention' cannot make {num_target} key/value heads of the decoder's {num_source}: "
        "one must divide the other; use init='random'."
    )


def dense_weight(linear: nn.Linear) -> Tensor:
    """The weight `[out, in]` of a linear layer; of a quantized one, what it does to the identity."""
    if type(linear) is nn.Linear and type(linear.weight) is nn.Parameter:
        return linear.weight
    identity = torch.eye(linear.in_features, device=linear.weight.device, dtype=torch.bfloat16)
    # a copy: bitsandbytes packs a weight anew when it is first used, and the digest is of the weight as it was loaded
    output = copy.deepcopy(linear)(identity)
    return (output if linear.bias is None else output - linear.bias).T


def _copy(target: nn.Linear, source: nn.Linear, num_source: int = 1, num_target: int = 1) -> None:
    target.weight.copy_(resize_heads(dense_weight(source), num_source, num_target))
    if target.bias is not None:
        if source.bias is None:
            target.bias.zero_()
        else:
            target.bias.copy_(resize_heads(source.bias, num_source, num_target))


def copy_self_attention(model) -> None:
    """Block after layer i copies q, k, v, o and the input norm of layer i + 1 (of i where i is the last).

    In joint mode there are only projections: that of layer i copies k, v and the input norm of layer i itself.

    Args:
        model: an `XCLlamaModel`. With a separate encoder only q, o and the query's norm are copied; shared modules
            copy what the first block would.

    Raises:
        ValueError: the heads of the blocks are not shaped like the decoder's.
    """
    config = model.config
    if (config.cross_attention_num_heads, config.cross_attention_head_dim) != (
        config.num_attention_heads,
        config.head_dim,
    ):
        raise ValueError(
            "init='self_attention' needs the decoder's heads: `cross_attention_num_heads`="
            f"{config.num_attention_heads} and `cross_attention_head_dim`={config.head_dim}, got "
            f"{config.cross_attention_num_heads} and {config.cross_attention_head_dim}; use init='random'."
        )
    if len(config.context_layers) > 1:
        raise ValueError(
            "init='self_attention' cannot read the states of several layers "
            f"(`context_layer`={config.context_layers}); use init='least_squares' or 'random'."
        )
    step = 0 if config.reads_jointly else 1
    sources = [model.layers[min(index + step, len(model.layers) - 1)] for index in config.cross_attention_layers]
    with torch.no_grad():
        for block, source in zip(model.cross_attention_blocks, sources, strict=False):
            block.input_norm.weight.copy_(source.input_layernorm.weight)
            _copy(block.q_proj, source.self_attn.q_proj)
            _copy(block.o_proj, source.self_attn.o_proj)
        if model.encoder is not None:
            return
        heads = config.num_key_value_heads, config.cross_attention_num_key_value_heads
        for projection, source in zip(model.context_projections, sources, strict=False):
            if projection.norm is not None:
                projection.norm.weight.copy_(source.input_layernorm.weight)
            _copy(projection.k_proj, source.self_attn.k_proj, *heads)
            _copy(projection.v_proj, source.self_attn.v_proj, *heads)


def zero_gates(model) -> None:
    """Close every gate, so that the logits equal the base model's.

    Raises:
        ValueError: the blocks have no gate.
    """
    if model.config.cross_attention_gate is None:
        raise ValueError("init='zero' needs a gate; set `cross_attention_gate` to 'scalar' or 'tanh'.")
    with torch.no_grad():
        for block in model.cross_attention_blocks:
            for gate in (block.gate, block.mlp_gate):
                if gate is not None:
                    gate.zero_()
