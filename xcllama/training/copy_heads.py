"""Which self-attention heads of a decoder copy: the layers whose projections cross-attention should start from.

A head that copies ("induction head": Olsson et al., 2022, arXiv 2209.11895) attends, at a token that occurred before,
to what followed it. It finds the place by what heads of lower layers, which attend to the previous token, wrote there.
"""

from typing import Any

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def copy_scores(model: PreTrainedModel, length: int = 60, rows: int = 4, seed: int = 0) -> dict[str, Any]:
    """Attention of every head on random tokens that are repeated once.

    Args:
        model: a decoder with eager attention.
        length: random tokens of a row, half of what the model reads.

    Returns:
        `copying` and `previous_token`, `[layers][heads]` each: mean attention of the repeated tokens to what followed
        them the first time, and of all tokens to the one before.

    Raises:
        ValueError: the model's attention is not eager, so that it returns no weights.
    """
    if model.config._attn_implementation != "eager":
        raise ValueError(
            f"copy_scores needs attn_implementation='eager', the model has {model.config._attn_implementation!r}."
        )
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(model.config.vocab_size // 50, model.config.vocab_size, (rows, length), generator=generator)
    first = torch.full((rows, 1), model.config.bos_token_id or 0)
    ids = torch.cat([first, once, once], 1).to(model.device)
    attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    again, tokens = torch.arange(length + 1, 2 * length), torch.arange(1, 2 * length)
    return {
        "copying": [layer[:, :, again, again - length + 1].mean((0, 2)).tolist() for layer in attentions],
        "previous_token": [layer[:, :, tokens, tokens - 1].mean((0, 2)).tolist() for layer in attentions],
    }


def copying_layers(scores: dict[str, Any], count: int) -> list[int]:
    """The `count` layers whose heads copy most, in their order; a block belongs before each of them."""
    total = [sum(heads) for heads in scores["copying"]]
    return sorted(sorted(range(len(total)), key=lambda layer: -total[layer])[:count])
