"""XCLlamaModel: the decoder layers with what reads contexts in or between them, and caches as keys and values."""

import copy
import os
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .added_modules import keep_added_modules
from .configuration_xcllama import XCLlamaConfig
from .context_cache import ContextCache, ProjectedContext
from .context_checks import ContextChecksMixin
from .context_encoding import ContextEncodingMixin, bare_encoder, check_sources, execution_device, linear_weight
from .context_projection import ReadingPlan, by_head, project_hidden, rotate_keys, row_positions
from .cross_attention import resolve_implementation
from .cross_attention_block import ContextProjection, CrossAttentionBlock
from .fingerprint import KeptDigest
from .joint_attention import ContextAdapter, ContextReader, JointAttention, JointReading
from .quantized_tensor import map_state
from .undisturbed import ordinary_tensors
from .wide_products import wide_products


class XCLlamaPreTrainedModel(LlamaPreTrainedModel):
    """Initialization and recording shared by the bare model and the language model."""

    config: XCLlamaConfig
    config_class = XCLlamaConfig
    _no_split_modules = ["LlamaDecoderLayer", "CrossAttentionBlock", "ContextProjection"]
    _can_record_outputs = {
        "hidden_states": LlamaDecoderLayer,
        "attentions": LlamaAttention,
        "cross_attentions": [OutputRecorder(CrossAttentionBlock, index=1), OutputRecorder(ContextReader, index=1)],
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CrossAttentionBlock):
            for gate in (module.gate, module.mlp_gate):
                if gate is not None:
                    init.constant_(gate, self.config.cross_attention_gate_init)
        if isinstance(module, ContextAdapter):
            init.zeros_(module.q_up_proj.weight)
            init.zeros_(module.v_up_proj.weight)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """`PreTrainedModel.from_pretrained`; a `quantization_config` leaves the added modules as they are saved."""
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = keep_added_modules(kwargs["quantization_config"])
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """`PreTrainedModel.save_pretrained`; the config says which caches the saved weights read."""
        self.config.context_fingerprint = self.base_model.context_fingerprint()
        super().save_pretrained(save_directory, **kwargs)


class XCLlamaModel(ContextEncodingMixin, ContextChecksMixin, XCLlamaPreTrainedModel, LlamaModel):
    """The decoder with its cross-attention blocks, and what encodes the contexts."""

    def __init__(self, config: XCLlamaConfig):
        super().__init__(config)
        count = len(config.cross_attention_layers)
        num_blocks = 1 if config.cross_attention_share_weights else count
        num_projections = 1 if config.cross_attention_share_key_value else num_blocks
        blocks, adapters = (), ()
        if config.reads_jointly:
            for index, layer in enumerate(self.layers):
                layer.self_attn = JointAttention(config, index)
            if config.cross_attention_adapter_rank is not None:
                adapters = (ContextAdapter(config) for _ in self.layers)
        else:
            blocks = (CrossAttentionBlock(config) for _ in range(num_blocks))
        self.cross_attention_blocks = nn.ModuleList(blocks)
        self.context_adapters = nn.ModuleList(adapters)
        self.context_projections = nn.ModuleList(ContextProjection(config) for _ in range(num_projections))
        # the position of a layer among those that read, or that a block follows
        self.block_after = {layer: index for index, layer in enumerate(config.cross_attention_layers)}
        # joint reading adds its mask to scores, whatever implementation the decoder's own attention has
        self._dense_mask_config = copy.deepcopy(config)
        self._dense_mask_config._attn_implementation = "eager"
        self.cross_rotary_emb = None
        if config.cross_attention_rope:
            rotary_config = LlamaModel.config_class(
                head_dim=config.cross_attention_head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters=dict(config.rope_parameters),
            )
            self.cross_rotary_emb = LlamaRotaryEmbedding(rotary_config)
        self.encoder = (
            None if config.encoder_config is None else bare_encoder(AutoModel.from_config(config.encoder_config))
        )
        self._kept_digest = KeptDigest()
        self.post_init()

    def _run_layers(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Cache | None,
        keep: Collection[int],
        context: ProjectedContext | None = None,
        **kwargs,
    ) -> list[Tensor]:
        """The inputs of the layers in `keep` (the number of layers: the last one's output), in rising order."""
        joint = context is not None and self.config.reads_jointly
        sliding = self.config.sliding_window
        make_mask = create_causal_mask if sliding is None else create_sliding_window_causal_mask
        causal_mask = make_mask(
            config=self._dense_mask_config if joint else self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if joint and causal_mask is not None and causal_mask.dtype == torch.bool:
            # `generate` makes the masks of static caches itself, for the decoder's own attention
            lowest = torch.finfo(hidden_states.dtype).min
            causal_mask = torch.zeros_like(causal_mask, dtype=hidden_states.dtype).masked_fill(~causal_mask, lowest)
        if sliding is not None:
            kwargs["sliding_window"] = sliding
        output_weights = bool(kwargs.get("output_attentions", self.config.output_attentions))
        if kwargs.pop("only_context_weights", False):
            # sdpa would warn that it gives no weights of its own
            kwargs.pop("output_attentions")
        readings = cross_positions = None
        if context is not None and self.cross_rotary_emb is not None:
            cross_positions = self.cross_rotary_emb(hidden_states, position_ids=position_ids)
        if joint:
            readings = self._readings(context, position_ids, len(hidden_states), output_weights)
            position_ids = self._after_documents(context, position_ids)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        kept = []
        for index, layer in enumerate(self.layers[: max(keep)]):
            if index in keep:
                kept.append(hidden_states)
            if joint:
                kwargs["reading"] = readings[index]
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            if context is not None and not joint and index in self.block_after:
                block = self.block_after[index]
                # keys and values go by position: reentrant checkpointing tracks only positional tensors
                hidden_states, _ = self.cross_attention_blocks[block % len(self.cross_attention_blocks)](
                    hidden_states,
                    context.keys[block % len(context.keys)],
                    context.values[block % len(context.values)],
                    context.rows,
                    context.implementation,
                    cross_positions,
                    output_weights,
                )
        return [*kept, hidden_states]

    def _readings(
        self, context: ProjectedContext, position_ids: Tensor, batch: int, output_weights: bool
    ) -> list[JointReading]:
        """What each layer reads; tokens of `context_prefix` come before the context and do not see it."""
        reads = (position_ids >= len(self.config.context_prefix or ())).expand(batch, -1)
        rows_read = context.rows.tensors(reads.device).reads
        if rows_read is not None:
            rows_read = rows_read[:, None, None]
            reads = reads & rows_read[:, 0]
        readings = []
        for index in range(self.config.num_hidden_layers):
            key = value = None
            if index in self.block_after and context.rows.offsets[-1]:
                place = self.block_after[index] % len(context.keys)
                # None where a layer is kept from reading, to see what it brings
                key, value = context.keys[place], context.values[place]
            adapter = self.context_adapters[index] if len(self.context_adapters) else None
            readings.append(
                JointReading(
                    key, value, context.rows, reads, rows_read, adapter, context.implementation, output_weights
                )
            )
        return readings

    def _after_documents(self, context: ProjectedContext, position_ids: Tensor) -> Tensor:
        """Positions of a row's own tokens: those of `context_prefix` stay, the others follow its longest document."""
        shift = context.rows.tensors(position_ids.device).longest[:, None]
        return position_ids + shift * (position_ids >= len(self.config.context_prefix or ()))

    @merge_with_config_defaults
    @capture_outputs
    def _decode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        context: ProjectedContext | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        (hidden_states,) = self._run_layers(
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            (self.config.num_hidden_layers,),
            context,
            use_cache=use_cache,
            **kwargs,
        )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        context_cache: ContextCache | ProjectedContext | None = None,
        context_input_ids: torch.LongTensor | None = None,
        context_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decode `input_ids` `[batch, length]`; row i reads context i of `context_cache` or `context_input_ids`.

        Raises:
            ValueError: both or none of ids and embeddings; a context that does not fit the batch or the model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `input_ids` and `inputs_embeds`.")
        if unknown := [name for name in kwargs if name.startswith("context")]:
            raise TypeError(f"`forward` has no argument `{unknown[0]}`; contexts come as `context_cache`.")
        batch = (input_ids if inputs_embeds is None else inputs_embeds).shape[0]
        context = self.resolve_context(context_cache, context_input_ids, context_attention_mask, batch)
        if context is not None and (past_key_values is None or not past_key_values.is_initialized):
            self.check_projections(context)
        return self._decode(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            context=context,
            **kwargs,
        )

    def resolve_context(
        self,
        context_cache: ContextCache | ProjectedContext | None,
        context_input_ids: Tensor | None,
        context_attention_mask: Tensor | None,
        batch: int | None,
    ) -> ProjectedContext | None:
        """Whatever names the contexts as keys and values for `batch` rows (None: any number), checked.

        Raises:
            ValueError: two sources of contexts, another number of rows, or a cache that this model cannot read.
        """
        check_sources(context_cache, context_input_ids, context_attention_mask)
        if context_input_ids is not None:
            context_cache = self._encode(context_input_ids, context_attention_mask)
        if context_cache is None:
            return None
        if batch is not None and len(context_cache) != batch:
            raise ValueError(
                f"the context has {len(context_cache)} rows and the batch {batch}: row i reads context i; "
                "use `cache.select([...])` to name a context for each row, or `cache.join([...])`."
            )
        if hasattr(context_cache, "states"):
            return self.project_context(context_cache)
        if context_cache.projections is not self.context_projections:
            raise ValueError("another model projected these keys and values: pass the cache that they came from.")
        return context_cache

    @ordinary_tensors()
    def project_context(self, cache: ContextCache) -> ProjectedContext:
        """Keys and values of every projection for the rows of `cache`; each document is projected once.

        Raises:
            ValueError: a cache of another model, template, layout or width.
        """
        device = execution_device(self.context_projections[0].k_proj)
        self.check_cache(cache)
        dtype = linear_weight(self.context_projections[0].k_proj).dtype
        if not dtype.is_floating_point:
            dtype = self.dtype
        plan = ReadingPlan.of(cache.offsets, cache.rows)
        # what no row reads stays where it is
        states = {
            name: map_state(state[plan.tokens], lambda part: part.to(device)) for name, state in cache.states.items()
        }
        return self.project_states(states, replace(plan, tokens=slice(None)), cache, dtype)

    def project_states(
        self, states: dict, plan: ReadingPlan, cache: ContextCache | None = None, dtype: torch.dtype | None = None
    ) -> ProjectedContext:
        """Keys and values of `plan`'s tokens of `states`, as `project_context` makes them of a cache; no checks."""
        device = next(iter(states.values())).device
        dtype = linear_weight(self.context_projections[0].k_proj).dtype if dtype is None else dtype
        if torch.is_autocast_enabled(device.type):
            # weights that are trained in float32 make keys of the queries' dtype
            dtype = torch.get_autocast_dtype(device.type)
        if self.training and self.config.cross_attention_dropout:
            plan = plan.drop_tokens(self.config.cross_attention_dropout, device)
        states = {name: state[plan.tokens] for name, state in states.items()}
        implementation = resolve_implementation(self.config.cross_attn_implementation, device)
        if "key" in states:
            projected = [(states["key"], states["value"])]
        else:
            with wide_products(self.norm.weight):
                projected = project_hidden(states["hidden"], self.context_projections, dtype, implementation)
        start = len(self.config.context_prefix or ())
        keys, values = [], []
        for key, value in projected:
            if isinstance(key, Tensor):
                key, value = key.to(dtype), value.to(dtype)
            if self.config.reads_jointly:
                # every document from the same start: its keys depend on no other one
                key = rotate_keys(key, plan.positions + start, self.rotary_emb)
            if plan.repeat is not None:
                key, value = key[plan.repeat], value[plan.repeat]
            if self.cross_rotary_emb is not None:
                key = rotate_keys(key, row_positions(plan.rows.offsets), self.cross_rotary_emb)
            if "hidden" in states and implementation != "triton":
                key, value = by_head(key), by_head(value)
            keys.append(key)
            values.append(value)
        # decided here, not in `forward`: steps are compiled
        implementation = resolve_implementation(self.config.cross_attn_implementation, device, keys[0])
        plan.rows.tensors(device)
        made_with = self.context_projections, implementation, self.projections_sample()
        return ProjectedContext(tuple(keys), tuple(values), plan.rows, cache, *made_with)
