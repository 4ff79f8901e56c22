"""From padded token ids to packed states and caches: batches by token budget, windows for long texts."""

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from .context_cache import ContextCache
from .undisturbed import evaluation, ordinary_tensors
from .wide_products import wide_products

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


class ContextEncodingMixin:
    """How an `XCLlamaModel` encodes contexts."""

    def encode_batch(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States `[num_contexts, length, width]` of right-padded ids."""
        layers = self.config.context_layers
        if self.encoder is not None:
            outputs = self.encoder(
                input_ids=ids, attention_mask=mask, output_hidden_states=self.config.context_layer is not None
            )
            if self.config.context_layer is None:
                return outputs.last_hidden_state
            return torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)
        prefix = ids.new_tensor(self.config.context_prefix or [], dtype=ids.dtype).expand(len(ids), -1)
        ids = torch.cat([prefix, ids], dim=1)
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        # causal and padded on the right: no token that counts ever sees the padding, so no mask is needed
        with torch.no_grad():
            states = self._run_layers(self.embed_tokens(ids), None, positions, None, layers, use_cache=False)
            if layers[-1] == self.config.num_hidden_layers:
                states[-1] = self.norm(states[-1])
        return torch.cat(states, dim=-1)[:, prefix.shape[1] :]

    def encode_packed(self, sequences: list[Tensor]) -> Tensor:
        """States `[num_tokens, width]` of sequences of ids: batches of similar length, windows of long ones."""
        config = self.config if self.encoder is None else self.config.encoder_config
        most = num_positions(config) - len(self.config.context_prefix or ())
        pieces = [(n, span) for n, ids in enumerate(sequences) for span in windows(len(ids), most)]
        encoded: dict[tuple, Tensor] = {}
        for batch in batches_by_length([end - start for _, (start, end) in pieces]):
            ids, mask = pad_right([sequences[pieces[i][0]][slice(*pieces[i][1])] for i in batch])
            with wide_products(self.norm.weight):
                encoded_batch = self.encode_batch(ids, mask)
            for index, states in zip(batch, encoded_batch, strict=True):
                start, end = pieces[index][1]
                encoded[pieces[index]] = states[: end - start]
        empty = torch.zeros((0, self.config.context_width), dtype=self.embed_tokens.weight.dtype)
        return torch.cat([empty.to(sequences[0].device), *(encoded[piece] for piece in pieces)])

    def _encode(self, context_input_ids: Tensor, context_attention_mask: Tensor | None) -> ContextCache:
        sequences = unpad(context_input_ids.to(execution_device(self.embed_tokens)), context_attention_mask)
        lengths = [len(sequence) for sequence in sequences]
        if max(lengths) > self.config.context_max_length:
            raise ValueError(
                f"a context has {max(lengths)} tokens, `context_max_length` is {self.config.context_max_length}; "
                "pass `truncation=True` to the processor, split the text, or raise the limit in the config."
            )
        source = self.embed_tokens if self.encoder is None else self.encoder.get_input_embeddings()
        check_vocabulary(sequences, source.num_embeddings)
        packed = self.encode_packed(sequences)
        if self.config.cross_attention_share_key_value:
            key, value = self.context_projections[0](packed)
            states = {"key": key, "value": value}
        else:
            states = {"hidden": packed}
        token_ids = torch.cat([sequence[:0] for sequence in sequences[:1]] + sequences).int().cpu()
        return ContextCache(states, tuple(accumulate(lengths, initial=0)), token_ids, self.context_fingerprint())

    @ordinary_tensors()
    @torch.no_grad()
    def encode_context(self, context_input_ids: Tensor, context_attention_mask: Tensor | None = None) -> ContextCache:
        """Encode contexts once, for any number of requests, as in evaluation whatever mode the modules are in.

        Args:
            context_input_ids: `[num_contexts, length]`, padded on either side.
            context_attention_mask: the same shape, 0 at padding; None: no padding.

        Returns:
            A `ContextCache` with one row a context, in the dtype of the model.

        Raises:
            ValueError: no context, a context longer than `context_max_length`, or states that are not finite.
        """
        encoder = (self, self.config) if self.encoder is None else (self.encoder, self.encoder.config)
        with evaluation(*encoder):
            return self._encode(context_input_ids, context_attention_mask)
