"""From padded token ids to packed states: batches by token budget, windows for long texts."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

# tokens encoded in one batch, padding included
TOKENS_PER_BATCH = 4096
# encoders whose positions start behind the padding index
OFFSET_POSITION_MODELS = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "longformer",
    "roberta-prelayernorm",
)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer or embedding; torch's own quantized layers hold it behind a function."""
    return module.weight() if callable(module.weight) else module.weight


def execution_device(module: nn.Module) -> torch.device:
    """Where a module with weights computes: its weights' device, or the one that they are brought to from disk.

    Raises:
        ValueError: weights on the meta device, which hold nothing.
    """
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    device = linear_weight(module).device if device is None else torch.device(device)
    if device.type == "meta":
        raise ValueError("this model is on the meta device and holds no weights: load them before contexts are read.")
    return device


def check_sources(context_cache, context_input_ids: Tensor | None, context_attention_mask: Tensor | None) -> None:
    """Raise where the arguments that name contexts do not belong together, or are none."""
    if context_cache is not None:
        if not (hasattr(context_cache, "states") or hasattr(context_cache, "projections")):
            raise TypeError(
                "`context_cache` must be a `ContextCache` or what `project_context` returns, got "
                f"{type(context_cache).__name__}; open a file with `model.load_context(path)`."
            )
        if context_input_ids is not None:
            raise ValueError("give either `context_cache` or `context_input_ids`, not both.")
    if context_attention_mask is not None and context_input_ids is None:
        raise ValueError("`context_attention_mask` belongs to `context_input_ids`: leave it out beside a cache.")


def unpad(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row of `[num_contexts, length]`, without padding on either side.

    Raises:
        ValueError: wrong shapes, or no context at all.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] == 0:
        raise ValueError(
            "`context_input_ids` must have shape [num_contexts, length] with at least one context, "
            f"got {list(input_ids.shape)}."
        )
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"`context_input_ids` must be integers, got {input_ids.dtype}.")
    if attention_mask is None:
        return list(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`context_attention_mask` must have the shape of `context_input_ids` {list(input_ids.shape)}, "
            f"got {list(attention_mask.shape)}."
        )
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("`context_attention_mask` must be 1 at tokens and 0 at padding, got other values.")
    return [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]


def check_vocabulary(sequences: list[Tensor], size: int) -> None:
    """Raise a ValueError if an id is none of a vocabulary of `size`: an accelerator would stop the process."""
    ids = torch.cat(sequences)
    if ids.numel() and not 0 <= (bounds := ids.aminmax()).min <= bounds.max < size:
        raise ValueError(
            f"`context_input_ids` must lie in [0, {size - 1}], got {int(bounds.min)} to {int(bounds.max)}."
        )


def bare_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of an encoder that makes states: no decoder, no pooler."""
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def num_positions(config) -> int:
    """Most tokens that a decoder or encoder with `config` was made to read at once."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 512
    return positions - (config.pad_token_id + 1) if config.model_type in OFFSET_POSITION_MODELS else positions


def windows(length: int, most: int) -> Iterator[tuple[int, int]]:
    """Spans that cover `length` tokens in as few windows of at most `most` as possible, evenly; none for no tokens."""
    count = -(-length // most)
    bounds = [round(index * length / max(count, 1)) for index in range(count + 1)]
    return zip(bounds[:-1], bounds[1:], strict=True)


def batches_by_length(lengths: list[int], tokens_per_batch: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Indices in batches of similar length, each at most `tokens_per_batch` tokens when padded (one item at least)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        # sorted by falling length: the first of a batch is its longest
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad_right(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack sequences of ids: ids and mask, `[num_sequences, longest]`."""
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=ids.device)
    return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
