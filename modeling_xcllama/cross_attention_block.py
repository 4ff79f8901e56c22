"""The added modules: what turns context states into keys and values, and the block that reads them."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from .cross_attention import CROSS_ATTENTION_FUNCTIONS, ContextRows, cross_attention_weights


def build_norm(config, width: int) -> nn.Module:
    """The norm that `cross_attention_norm` names."""
    norm = LlamaRMSNorm if config.cross_attention_norm == "rms_norm" else nn.LayerNorm
    return norm(width, eps=config.rms_norm_eps)


class StateRMSNorm(LlamaRMSNorm):
    """RMSNorm of each of the `num_parts` layers' states that stand side by side in `[..., width]`."""

    def __init__(self, width: int, num_parts: int, eps: float):
        super().__init__(width, eps=eps)
        self.num_parts = num_parts

    def normalize(self, states: Tensor) -> Tensor:
        """States over the root mean square of their part."""
        parts = states.unflatten(-1, (self.num_parts, -1))
        return functional.rms_norm(parts, parts.shape[-1:], None, self.variance_epsilon).flatten(-2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * self.normalize(hidden_states)


def rotate(states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on `states` `[..., length, heads, dim]` with `cos`, `sin` `[..., length, dim]`."""
    cos, sin = (part.unsqueeze(-2) for part in position_embeddings)
    return states * cos + rotate_half(states) * sin


class ContextProjection(nn.Module):
    """Context states `[num_tokens, width]` to keys and values `[num_tokens, kv_heads, head_dim]`."""

    def __init__(self, config):
        super().__init__()
        width, self.head_dim = config.context_width, config.cross_attention_head_dim
        inner = config.cross_attention_num_key_value_heads * self.head_dim
        self.norm = None
        if config.cross_attention_context_norm:
            of_rms = config.cross_attention_norm == "rms_norm"
            num_parts = len(config.context_layers)
            self.norm = StateRMSNorm(width, num_parts, config.rms_norm_eps) if of_rms else build_norm(config, width)
        self.k_proj = nn.Linear(width, inner, bias=config.cross_attention_bias)
        self.v_proj = nn.Linear(width, inner, bias=config.cross_attention_bias)

    def forward(self, states: Tensor, normalized: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values; `normalized`: the states over their root mean square, which projections can share."""
        linears = (self.k_proj, self.v_proj)
        if normalized is not None and all(type(linear) is nn.Linear for linear in linears):
            # the norm's weight scales the few weights, not the many states; one product instead of two
            weight = torch.cat([linear.weight for linear in linears]) * self.norm.weight
            bias = None if self.k_proj.bias is None else torch.cat([linear.bias for linear in linears])
            key, value = functional.linear(normalized, weight, bias).chunk(2, dim=-1)
        else:
            if self.norm is not None:
                states = self.norm(states) if normalized is None else self.norm.weight * normalized
            key, value = self.k_proj(states), self.v_proj(states)
        return key.unflatten(-1, (-1, self.head_dim)), value.unflatten(-1, (-1, self.head_dim))


class CrossAttentionMLP(nn.Module):
    """SwiGLU of the paper's block."""

    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.cross_attention_intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class CrossAttentionBlock(GradientCheckpointingLayer):
    """norm, cross-attention, gate, residual and, if the config has one, norm, MLP, gate, residual."""

    def __init__(self, config):
        super().__init__()
        inner, self.head_dim = config.cross_attention_hidden_size, config.cross_attention_head_dim
        self.input_norm = build_norm(config, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.cross_attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.cross_attention_bias)
        self.tanh_gate = config.cross_attention_gate == "tanh"
        self.gate = self.mlp = self.mlp_norm = self.mlp_gate = None
        if config.cross_attention_gate is not None:
            self.gate = nn.Parameter(torch.empty(1))
        if config.cross_attention_intermediate_size is not None:
            self.mlp_norm, self.mlp = build_norm(config, config.hidden_size), CrossAttentionMLP(config)
            if config.cross_attention_gate is not None:
                self.mlp_gate = nn.Parameter(torch.empty(1))

    def _gated(self, output: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            return output
        return output * (gate.tanh() if self.tanh_gate else gate).to(output.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        key: Tensor,
        value: Tensor,
        rows: ContextRows,
        implementation: str,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Let `hidden_states` `[batch, length, hidden]` read their contexts; rows without one pass unchanged.

        Returns:
            The new hidden states and, if asked for, the weights `[batch, heads, length, longest context]`.
        """
        query = self.q_proj(self.input_norm(hidden_states)).unflatten(-1, (-1, self.head_dim))
        if position_embeddings is not None:
            query = rotate(query, position_embeddings)
        scale = self.head_dim**-0.5
        attended = CROSS_ATTENTION_FUNCTIONS[implementation](query, key, value, rows, scale).flatten(-2)
        output = hidden_states + self._gated(self.o_proj(attended), self.gate)
        if self.mlp is not None:
            output = output + self._gated(self.mlp(self.mlp_norm(output)), self.mlp_gate)
        reads = rows.tensors(output.device).reads
        if reads is not None:
            output = torch.where(reads[:, None, None], output, hidden_states)
        weights = cross_attention_weights(query, key, rows, scale) if output_attentions else None
        return output, weights
