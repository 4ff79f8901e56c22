"""A closed-form start of the key and value projections: ridge regression onto the decoder's own keys and values.

A block after decoder layer i reads what the self-attention of layer i + 1 would read of the same text, save for RoPE:
that layer's keys and values are nearly linear in the cached states (R2 above 0.8 in the upper half of SmolLM2-135M).
Keys and values that all blocks share cannot follow every layer: see `xcllama.training.transfer` for those.
"""

import logging

import torch
from torch import Tensor, nn

from modeling_xcllama import XCLlamaForCausalLM

logger = logging.getLogger(__name__)

RIDGE = 1e-3


@torch.no_grad()
def fit_key_value(model: XCLlamaForCausalLM, passages: list[list[int]]) -> dict[int, float]:
    """Set k and v of every projection from the tokens of `passages` (token ids); returns R2 by decoder layer.

    Raises:
        ValueError: the context is not encoded by the decoder, the blocks share their keys and values, or their heads
            are not the decoder's.
    """
    config = model.config
    same = (config.cross_attention_num_key_value_heads, config.cross_attention_head_dim) == (
        config.num_key_value_heads,
        config.head_dim,
    )
    if config.encoder_config is not None or config.cross_attention_share_key_value or not same:
        raise ValueError(
            "`model.least_squares_passages` needs a decoder that encodes, keys and values for each block, and the "
            "decoder's own key/value heads; set it to 0, or name a trained checkpoint as `model.transfer_from`."
        )
    followed = [min(layer + 1, config.num_hidden_layers - 1) for layer in config.cross_attention_layers]
    states, keys, values = _collect(model, passages, set(followed))
    inputs = normalized(states, config.rms_norm_eps)
    scores = {}
    for layer, source, projection in zip(
        config.cross_attention_layers, followed, model.model.context_projections, strict=True
    ):
        parts = zip(linears(projection), (keys[source], values[source]), strict=True)
        scores[layer] = sum(ridge_fit(linear, inputs, part) for linear, part in parts) / 2
    logger.info(
        "least squares on %d tokens, R2 by block: %s", len(states), {k: round(v, 3) for k, v in scores.items()}
    )
    return scores


def linears(projection: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """k and v of a projection, its norm set to leave states as they are."""
    if projection.norm is not None:
        projection.norm.weight.fill_(1.0)
    return projection.k_proj, projection.v_proj


def ridge_fit(linear: nn.Linear, inputs: Tensor, wanted: Tensor) -> float:
    """Set the weight by ridge regression of `wanted` on `inputs`; returns R2."""
    gram = inputs.T @ inputs
    gram += torch.eye(gram.shape[0]) * gram.diagonal().mean() * RIDGE
    weight = torch.linalg.solve(gram, inputs.T @ wanted)
    linear.weight.copy_(weight.T)
    return 1 - ((inputs @ weight - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()).item()


def normalized(states: Tensor, eps: float) -> Tensor:
    """States over their root mean square."""
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
