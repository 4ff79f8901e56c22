"""Joint reading: the decoder's own queries attend to context keys and own keys in one softmax."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from .cross_attention import ContextRows, attend_with_lse, cross_attention_weights, cross_attention_with_lse


class ContextAdapter(nn.Module):
    """Low-rank updates of a layer's queries and values, for rows that read a context."""

    def __init__(self, config):
        super().__init__()
        rank, width = config.cross_attention_adapter_rank, config.hidden_size
        self.down_proj = nn.Linear(width, 2 * rank, bias=False)
        self.q_up_proj = nn.Linear(rank, config.num_attention_heads * config.head_dim, bias=False)
        self.v_up_proj = nn.Linear(rank, config.num_key_value_heads * config.head_dim, bias=False)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        query, value = self.down_proj(states).chunk(2, dim=-1)
        return self.q_up_proj(query), self.v_up_proj(value)


@dataclass(frozen=True)
class JointReading:
    """What one decoder layer reads beside its own tokens.

    Args:
        key, value: of the contexts, `[num_tokens, kv_heads, head_dim]`, rotated; None: this layer reads none.
        rows: which of these tokens each row reads.
        reads: bool `[batch, length]`, the tokens that read: not those before the context.
        rows_read: bool `[batch, 1, 1]`, the rows that have a context; None: all.
        adapter: of this layer, or None.
        implementation: backend of the context's part.
        output_weights: whether to return attention weights over the contexts.
    """

    key: "Tensor | None"
    value: "Tensor | None"
    rows: ContextRows
    reads: Tensor
    rows_read: Tensor | None
    adapter: ContextAdapter | None
    implementation: str
    output_weights: bool


class ContextReader(nn.Module):
    """Merges what the context gives into what the row's own tokens give, as one softmax over both would."""

    def forward(
        self, query: Tensor, own: Tensor, own_normalizer: Tensor, reading: JointReading, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Merge by the logs of both normalizers.

        Args:
            query, own: `[batch, length, num_heads, head_dim]`.
            own_normalizer: float32 `[batch, length, num_heads, 1]`.

        Returns:
            The attended values and, if asked for, the weights `[batch, heads, length, longest context]`.
        """
        attended, normalizer = cross_attention_with_lse(
            query, reading.key, reading.value, reading.rows, scale, reading.implementation
        )
        normalizer = normalizer.masked_fill(~reading.reads[:, :, None, None], -torch.inf)
        both = torch.logaddexp(own_normalizer, normalizer)
        share = (normalizer - both).exp()
        merged = own * (own_normalizer - both).exp().to(own.dtype) + attended * share.to(own.dtype)
        if not reading.output_weights:
            return merged, None
        return merged, cross_attention_weights(query, reading.key, reading.rows, scale) * share.transpose(1, 2)


class JointAttention(LlamaAttention):
    """The decoder's self-attention, which can read contexts; without one it is the decoder's own."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.reader = ContextReader()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        reading: JointReading | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """`LlamaAttention.forward`; a `reading` needs a mask that is added to scores, `[batch, 1, length, keys]`."""
        if reading is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if reading.adapter is not None:
            more_query, more_value = reading.adapter(hidden_states)
            if reading.rows_read is not None:
                more_query, more_value = more_query * reading.rows_read, more_value * reading.rows_read
            query, value = query + more_query, value + more_value
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # queries that share a key and value head stand side by side: no head is repeated
        grouped = query.unflatten(1, (-1, self.num_key_value_groups))
        mask = None if attention_mask is None else attention_mask.unsqueeze(2)
        own, normalizer = attend_with_lse(grouped, key.unsqueeze(2), value.unsqueeze(2), self.scaling, mask)
        own, normalizer = (part.flatten(1, 2).transpose(1, 2) for part in (own, normalizer))
        if reading.key is not None:
            own, _ = self.reader(query.transpose(1, 2), own, normalizer, reading, self.scaling)
        return self.o_proj(own.flatten(2)), None
