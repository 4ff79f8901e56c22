"""A closed-form start of the key and value projections: ridge regression onto the decoder's own keys and values.

A block after decoder layer i reads what the self-attention of layer i + 1 would read of the same text, save for RoPE:
that layer's keys and values are nearly linear in the cached states (R2 above 0.8 in the upper half of SmolLM2-135M).
Keys and values that all blocks share cannot follow every layer: each of their heads takes the place of one key/value
head of the decoder, those whose queries copy most, and blocks before other layers start silent.
"""

import logging

import torch
from torch import Tensor, nn

from modeling_xcllama import XCLlamaForCausalLM
from training.copy_heads import copy_scores

logger = logging.getLogger(__name__)

RIDGE = 1e-3


@torch.no_grad()
def fit_key_value(model: XCLlamaForCausalLM, passages: list[list[int]]) -> dict[int, float]:
    """Set k and v of every projection from the tokens of `passages` (token ids); returns R2 by decoder layer.

    Raises:
        ValueError: the context is not encoded by the decoder, or the blocks' heads are not the decoder's.
    """
    config = model.config
    same = (config.cross_attention_num_key_value_heads, config.cross_attention_head_dim) == (
        config.num_key_value_heads,
        config.head_dim,
    )
    if config.encoder_config is not None or not same:
        raise ValueError(
            "`model.least_squares_passages` needs a decoder that encodes, and its own key/value heads; set it to 0."
        )
    followed = [min(layer + 1, config.num_hidden_layers - 1) for layer in config.cross_attention_layers]
    shared = config.cross_attention_share_key_value
    heads = _copying_heads(model, followed) if shared else None
    states, keys, values = _collect(model, passages, {layer for layer, _ in heads} if shared else set(followed))
    if shared:
        size = config.head_dim
        wanted = [
            tuple(
                torch.cat([of[layer][:, head * size : (head + 1) * size] for layer, head in heads], 1)
                for of in (keys, values)
            )
        ]
        _take_queries(model, followed, heads)
    else:
        wanted = [(keys[layer], values[layer]) for layer in followed]
    inputs = _normalized(states, config.rms_norm_eps)
    gram = inputs.T @ inputs
    gram += torch.eye(gram.shape[0]) * gram.diagonal().mean() * RIDGE
    scores = {}
    for layer, projection, targets in zip(
        config.cross_attention_layers, model.model.context_projections, wanted, strict=False
    ):
        fits = [
            _fit(linear, inputs, gram, target) for linear, target in zip(_linears(projection), targets, strict=True)
        ]
        scores[layer] = sum(fits) / 2
    logger.info(
        "least squares on %d tokens, R2 by block: %s", len(states), {k: round(v, 3) for k, v in scores.items()}
    )
    return scores


def _linears(projection: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """k and v of a projection, its norm set to leave states as they are."""
    if projection.norm is not None:
        projection.norm.weight.fill_(1.0)
    return projection.k_proj, projection.v_proj


def _fit(linear: nn.Linear, inputs: Tensor, gram: Tensor, wanted: Tensor) -> float:
    """Set the weight by ridge regression of `wanted` on `inputs`; returns R2."""
    weight = torch.linalg.solve(gram, inputs.T @ wanted)
    linear.weight.copy_(weight.T)
    return 1 - ((inputs @ weight - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()).item()


def _copying_heads(model: XCLlamaForCausalLM, layers: list[int]) -> list[tuple[int, int]]:
    """(layer, key/value head) of the decoder whose queries copy most, one for each shared head."""
    copying = torch.tensor(copy_scores(model)["copying"]).unflatten(1, (model.config.num_key_value_heads, -1)).sum(-1)
    found = [(layer, head) for layer in sorted(set(layers)) for head in range(copying.shape[1])]
    return sorted(found, key=lambda place: -copying[place])[: copying.shape[1]]


def _take_queries(model: XCLlamaForCausalLM, followed: list[int], heads: list[tuple[int, int]]) -> None:
    """Give each block the queries of the heads that were taken from the layer that follows it, and no other output."""
    size = model.config.head_dim * model.config.num_attention_heads // model.config.num_key_value_heads
    for block, layer in zip(model.model.cross_attention_blocks, followed, strict=True):
        attention = model.model.layers[layer].self_attn
        block.o_proj.weight.zero_()
        for place, (source, head) in enumerate(heads):
            if source == layer:
                here, there = slice(place * size, (place + 1) * size), slice(head * size, (head + 1) * size)
                block.q_proj.weight[here] = attention.q_proj.weight[there].to(block.q_proj.weight.dtype)
                block.o_proj.weight[:, here] = attention.o_proj.weight[:, there].to(block.o_proj.weight.dtype)


def _normalized(states: Tensor, eps: float) -> Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)


def _collect(
    model: XCLlamaForCausalLM, passages: list[list[int]], layers: set[int]
) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """Context states, and keys and values before RoPE of `layers`, for all tokens but the first of each passage."""
    depth = model.config.context_layer
    states, keys, values = [], {layer: [] for layer in layers}, {layer: [] for layer in layers}
    for ids in passages:
        hidden = model.model(
            input_ids=torch.tensor([ids], device=model.device), output_hidden_states=True
        ).hidden_states
        states.append(hidden[-1 if depth is None else depth][0, 1:].float().cpu())
        for layer in layers:
            decoder_layer = model.model.layers[layer]
            inputs = decoder_layer.input_layernorm(hidden[layer][0, 1:])
            keys[layer].append(decoder_layer.self_attn.k_proj(inputs).float().cpu())
            values[layer].append(decoder_layer.self_attn.v_proj(inputs).float().cpu())
    return torch.cat(states), *({layer: torch.cat(part) for layer, part in parts.items()} for parts in (keys, values))
