"""Context projections in closed form: ridge regression of the decoder's own keys and values on the cached states.

A layer's keys and values of a text are nearly linear in the states of a middle layer, so that a model reads its caches
without any training. Sums of products are streamed: memory does not grow with the text. Keys and values that several
layers share cannot follow every layer: they need training.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

RIDGE = 1e-3


class RidgeRegression:
    """Sums of products from which linear maps of several targets are solved.

    Args:
        width: values of an input; a constant is added to each.
        widths: values of each target.
    """

    def __init__(self, width: int, widths: list[int], device: torch.device | None = None):
        options = {"dtype": torch.float64, "device": device}
        self.widths, self.count = widths, 0
        self.gram = torch.zeros(width + 1, width + 1, **options)
        self.products = torch.zeros(width + 1, sum(widths), **options)
        self.squares = torch.zeros(sum(widths), **options)

    def add(self, inputs: Tensor, targets: list[Tensor]) -> None:
        """Count the tokens of `inputs` `[num_tokens, width]` and of each target."""
        inputs = torch.cat([inputs.float(), inputs.new_ones(len(inputs), 1, dtype=torch.float32)], dim=1)
        wanted = torch.cat([target.float() for target in targets], dim=1)
        self.count += len(inputs)
        self.gram += inputs.T @ inputs
        self.products += inputs.T @ wanted
        self.squares += wanted.double().square().sum(0)

    def solve(self, ridge: float = RIDGE) -> tuple[list[Tensor], list[float]]:
        """Weights `[width + 1, target width]` of each target, the last row for the constant, and their R2."""
        damped = self.gram + torch.eye(len(self.gram), device=self.gram.device) * self.gram.diagonal().mean() * ridge
        weights = torch.linalg.solve(damped, self.products)
        explained = 2 * (weights * self.products).sum(0) - (weights * (self.gram @ weights)).sum(0)
        residual = self.squares - explained
        # the last input is the constant one: its products are the sums of the targets
        spread = self.squares - self.products[-1].square() / self.count
        parts = zip(residual.split(self.widths), spread.split(self.widths), strict=True)
        return list(weights.split(self.widths, dim=1)), [(1 - a.sum() / b.sum()).item() for a, b in parts]


@torch.no_grad()
def fit_least_squares(
    model: PreTrainedModel, sequences: Iterable[list[int]], reader: PreTrainedModel | None = None
) -> dict[int, float]:
    """Set the context projections of an `XCLlamaForCausalLM` from texts; no training.

    Args:
        model: its decoder encodes, and every layer or block that reads has a projection of its own.
        sequences: token ids of texts, without `context_prefix`.
        reader: decoder of the same shape whose keys and values are wanted (with an adapter merged, say); None: the
            model's own.

    Returns:
        R2 of keys and values, by decoder layer.

    Raises:
        ValueError: a separate encoder, shared or otherwise shaped keys and values, no text.
    """
    config, inner = model.config, model.model
    own = (config.num_key_value_heads, config.head_dim)
    shared = config.cross_attention_share_key_value or config.cross_attention_share_weights
    if (
        config.encoder_config is not None
        or shared
        or own != (config.cross_attention_num_key_value_heads, config.cross_attention_head_dim)
    ):
        raise ValueError(
            "least squares need a decoder that encodes, a key and value projection for each layer that reads, and the "
            f"decoder's own {own[0]} key/value heads of {own[1]}; use another `init`."
        )
    projections = list(inner.context_projections)
    # a block reads what the layer after it would read
    step = 0 if config.reads_jointly else 1
    layers = [min(layer + step, config.num_hidden_layers - 1) for layer in config.cross_attention_layers]
    width = config.num_key_value_heads * config.head_dim
    sums = RidgeRegression(config.context_width, [2 * width] * len(layers), model.device)
    prefix = config.context_prefix or []
    # the first token draws idle attention: its states are like no other's
    skip = max(1, len(prefix))
    for ids in sequences:
        if len(ids) + len(prefix) <= skip:
            continue
        encoded = torch.tensor([[*prefix, *ids]], device=model.device)
        hidden = inner(input_ids=encoded, output_hidden_states=True, use_cache=False).hidden_states
        states = torch.cat([hidden[layer] for layer in config.context_layers], dim=-1)[0, skip:]
        if reader is not None:
            hidden = reader.model(input_ids=encoded, output_hidden_states=True, use_cache=False).hidden_states
        decoder = (inner if reader is None else reader.model).layers
        targets = [key_and_value(decoder[layer], hidden[layer][0, skip:]) for layer in layers]
        sums.add(normalized(projections[0].norm, states), targets)
    if not sums.count:
        raise ValueError("least squares need at least one text of two tokens.")
    weights, scores = sums.solve()
    for projection, weight in zip(projections, weights, strict=True):
        set_projection(projection, weight)
    return dict(zip(config.cross_attention_layers, scores, strict=True))


def key_and_value(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """Keys (before RoPE) and values of a decoder layer, side by side."""
    states = layer.input_layernorm(hidden_states)
    return torch.cat([layer.self_attn.k_proj(states), layer.self_attn.v_proj(states)], dim=-1)


def normalized(norm: nn.Module | None, states: Tensor) -> Tensor:
    """What a projection's norm leaves of `states` with a weight of ones."""
    if norm is None:
        return states
    if hasattr(norm, "normalize"):
        return norm.normalize(states.float())
    return nn.functional.layer_norm(states.float(), states.shape[-1:], eps=norm.eps)


def set_projection(projection: nn.Module, weight: Tensor) -> None:
    """Give a `ContextProjection` the solved map `[width + 1, 2 * inner]`, its norm left without effect."""
    if projection.norm is not None:
        projection.norm.weight.fill_(1.0)
        if getattr(projection.norm, "bias", None) is not None:
            projection.norm.bias.zero_()
    for linear, part in zip((projection.k_proj, projection.v_proj), weight.chunk(2, dim=1), strict=True):
        linear.weight.copy_(part[:-1].T)
        if linear.bias is not None:
            linear.bias.copy_(part[-1])
