"""XCLlamaConfig: the Llama config plus the cross-attention fields, with every structural check."""

import re
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

# fields of an encoder's config that say nothing about its states
DESCRIPTIVE = re.compile(
    r"^_|name_or_path|architectures|version|dtype|token_id$|label|drop|initializer|cache|checkpoint"
)


@strict
class XCLlamaConfig(LlamaConfig):
    """Configuration of an XC-Llama: a Llama decoder with added cross-attention over cached contexts.

    Args:
        cross_attention_mode: "block": a block of its own follows each layer of `cross_attention_layers`, as in the
            paper; "joint": in these layers the decoder's own queries attend to context keys and own keys in one
            softmax. Every document's keys are then rotated from the same position, the row's own tokens follow its
            longest document.
        cross_attention_layers: decoder layers (0-based) that a cross-attention block follows (block), or that read
            (joint; None: all).
        cross_attention_hidden_size: total width of the queries, `num_heads * head_dim` (None: the decoder's).
        cross_attention_head_dim: width of one head (None: `cross_attention_hidden_size / num_heads`).
        cross_attention_num_heads: query heads (None: the decoder's).
        cross_attention_num_key_value_heads: key and value heads, as in GQA (None: the decoder's).
        cross_attention_intermediate_size: inner width of the block's SwiGLU (None: no MLP).
        cross_attention_norm: "rms_norm" or "layer_norm", for every norm of the blocks.
        cross_attention_context_norm: whether the context states are normalized before keys and values.
        cross_attention_rope: whether queries (decoder positions) and keys (positions 0.. of the context) are rotated.
            The result then depends on the order of joined documents.
        cross_attention_gate: None, "scalar" (`g * output`) or "tanh" (`tanh(g) * output`); joint mode has none.
        cross_attention_gate_init: initial value of the gate parameter `g`.
        cross_attention_share_weights: all blocks are one block.
        cross_attention_share_key_value: all blocks read one key/value projection (condensed layout of the cache).
        cross_attention_dropout: dropout of whole context tokens in training, as probability.
        cross_attention_bias: biases in the projections of the blocks and contexts (None: in joint mode).
        cross_attention_adapter_rank: joint mode: rank of the low-rank updates of q and v that rows with a context use
            in every layer (None: none).
        cross_attn_implementation: "auto", "eager", "sdpa" or "triton"; chosen at load time, never serialized.
        encoder_config: config of a separate encoder (XC-LlamaEnc); None: the decoder encodes.
        context_layer: index into `output_hidden_states` of the decoder (or encoder) whose states are cached, or a list
            of them: their states side by side; None: the last, after the final norm.
        context_prefix: token ids that stand before every context when the decoder encodes it, and with which every
            prompt starts (the head of a chat template): they draw idle attention. Not cached; None: none.
        context_max_length: most tokens of one context.
        answer_threshold: answers with a lower score (geometric mean of their tokens' probabilities) are declined by
            the pipeline and what else answers users; None: none is.
        context_fingerprint: of the saved weights, for readers of the file: the model computes its own.
        template_version: version of the processor's context template.
        sliding_window: window of the decoder's self-attention (Mistral), None: full.
        base_model_name_or_path: where the frozen decoder came from.
        base_model_digest: digest of the frozen decoder's weights.
        encoder_name_or_path: where the encoder came from.
    """

    model_type = "xcllama"
    sub_configs: ClassVar[dict] = {"encoder_config": AutoConfig}

    cross_attention_mode: str = "block"
    cross_attention_layers: list[int] | None = None
    cross_attention_hidden_size: int | None = None
    cross_attention_head_dim: int | None = None
    cross_attention_num_heads: int | None = None
    cross_attention_num_key_value_heads: int | None = None
    cross_attention_intermediate_size: int | None = None
    cross_attention_norm: str = "rms_norm"
    cross_attention_context_norm: bool = True
    cross_attention_rope: bool = False
    cross_attention_gate: str | None = "scalar"
    cross_attention_gate_init: int | float = 0.5
    cross_attention_share_weights: bool = False
    cross_attention_share_key_value: bool = False
    cross_attention_dropout: int | float = 0.0
    cross_attention_bias: bool | None = None
    cross_attention_adapter_rank: int | None = None
    cross_attn_implementation: str = "auto"
    encoder_config: dict | object | None = None
    context_layer: int | list[int] | None = None
    context_prefix: list[int] | None = None
    context_max_length: int = 131072
    answer_threshold: int | float | None = None
    context_fingerprint: str | None = None
    template_version: str = "1"
    sliding_window: int | None = None
    base_model_name_or_path: str | None = None
    base_model_digest: str | None = None
    encoder_name_or_path: str | None = None

    def __post_init__(self, **kwargs):
        if unknown := sorted(key for key in kwargs if key.startswith(("cross_attention", "context_"))):
            raise ValueError(
                f"`XCLlamaConfig` has no field {', '.join(f'`{key}`' for key in unknown)}; see its docstring."
            )
        if not isinstance(self.encoder_config, dict | PreTrainedConfig | None):
            raise ValueError(f"`encoder_config` must be a config or None, got {self.encoder_config!r:.80}.")
        if isinstance(self.encoder_config, dict):
            self.encoder_config = AutoConfig.for_model(**({"model_type": "bert"} | self.encoder_config))
        super().__post_init__(**kwargs)
        joint = self.reads_jointly
        if self.cross_attention_layers is None:
            # of few blocks, those in the upper half read best; a decoder reads its prompt in all layers
            few = range(self.num_hidden_layers // 2, self.num_hidden_layers, 2)
            self.cross_attention_layers = list(range(self.num_hidden_layers) if joint else few)
        if self.cross_attention_bias is None:
            self.cross_attention_bias = joint
        if joint and self.cross_attention_gate == "scalar":
            self.cross_attention_gate = None
        if self.cross_attention_num_heads is None:
            self.cross_attention_num_heads = self.num_attention_heads
        heads = self.cross_attention_num_heads
        if self.cross_attention_num_key_value_heads is None:
            same = heads == self.num_attention_heads
            self.cross_attention_num_key_value_heads = self.num_key_value_heads if same else heads
        if self.cross_attention_head_dim is None:
            if self.cross_attention_hidden_size is None:
                self.cross_attention_head_dim = self.head_dim
            elif heads > 0 and self.cross_attention_hidden_size % heads == 0:
                self.cross_attention_head_dim = self.cross_attention_hidden_size // heads
            else:
                raise ValueError(
                    f"`cross_attention_hidden_size` must be a multiple of `cross_attention_num_heads` ({heads}), "
                    f"got {self.cross_attention_hidden_size}."
                )
        if self.cross_attention_hidden_size is None:
            self.cross_attention_hidden_size = heads * self.cross_attention_head_dim
        # `@strict` runs these too, but wraps what they raise in an error that is no ValueError
        self.validate_cross_attention_layers()
        self.validate_cross_attention_heads()
        self.validate_cross_attention_choices()
        self.validate_cross_attention_numbers()
        self.validate_context_layer()
        self.validate_joint_mode()

    @property
    def reads_jointly(self) -> bool:
        """Whether contexts enter the decoder's own attention, not blocks of their own."""
        return self.cross_attention_mode == "joint"

    @property
    def context_layers(self) -> list[int]:
        """Indices into `output_hidden_states` of what encodes, whose states are cached side by side."""
        if isinstance(self.context_layer, list):
            return self.context_layer
        config = self if self.encoder_config is None else self.encoder_config
        return [config.num_hidden_layers if self.context_layer is None else self.context_layer]

    @property
    def context_width(self) -> int:
        """Width of one context state, in values."""
        width = self.hidden_size if self.encoder_config is None else self.encoder_config.hidden_size
        return width * len(self.context_layers)

    @property
    def context_layout(self) -> str:
        """Layout of the caches this model makes: "condensed" holds final keys and values, "hidden" the states."""
        return "condensed" if self.cross_attention_share_key_value else "hidden"

    def context_fields(self, layout: str) -> dict[str, object]:
        """Fields that shape a cached state of `layout` beside the weights, as they are now."""
        fields = {"context_layer": self.context_layer, "layout": layout, "template_version": self.template_version}
        if layout == "condensed":
            fields["cross_attention_norm"] = self.cross_attention_norm
        if self.encoder_config is not None:
            values = self.encoder_config.to_diff_dict().items()
            return fields | {f"encoder_{key}": value for key, value in values if not DESCRIPTIVE.search(key)}
        # the last layer by its number is the last layer
        fields |= {"context_layer": self.context_layers, "context_prefix": self.context_prefix or []}
        names = ("rope_parameters", "max_position_embeddings", "sliding_window")
        return fields | {name: getattr(self, name) for name in names}

    def validate_cross_attention_layers(self):
        """Rule: distinct, increasing indices of decoder layers, at least one."""
        layers = self.cross_attention_layers
        in_range = bool(layers) and layers == sorted(set(layers)) and 0 <= layers[0]
        if not in_range or layers[-1] >= self.num_hidden_layers:
            raise ValueError(
                "`cross_attention_layers` must be distinct, increasing indices in "
                f"[0, {self.num_hidden_layers - 1}], at least one, got {layers}."
            )

    def validate_cross_attention_heads(self):
        """Rules on head counts and widths."""
        heads, groups = self.cross_attention_num_heads, self.cross_attention_num_key_value_heads
        if heads < 1 or groups < 1 or heads % groups:
            raise ValueError(
                "`cross_attention_num_heads` must be a positive multiple of `cross_attention_num_key_value_heads`, "
                f"got {heads} and {groups}."
            )
        if self.cross_attention_hidden_size != heads * self.cross_attention_head_dim:
            raise ValueError(
                "`cross_attention_hidden_size` must be `cross_attention_num_heads * cross_attention_head_dim` = "
                f"{heads * self.cross_attention_head_dim}, got {self.cross_attention_hidden_size}; leave it out."
            )
        if self.cross_attention_head_dim < 1 or (self.cross_attention_rope and self.cross_attention_head_dim % 2):
            raise ValueError(
                "`cross_attention_head_dim` must be positive, and even with `cross_attention_rope`, "
                f"got {self.cross_attention_head_dim}."
            )

    def validate_cross_attention_choices(self):
        """Rule: fields with a fixed list of values hold one of them."""
        choices = {
            "cross_attention_mode": ("block", "joint"),
            "cross_attention_norm": ("rms_norm", "layer_norm"),
            "cross_attention_gate": (None, "scalar", "tanh"),
            "cross_attn_implementation": ("auto", "eager", "sdpa", "triton"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"`{field}` must be one of {', '.join(map(repr, allowed))}, got {getattr(self, field)!r}."
                )

    def validate_cross_attention_numbers(self):
        """Rules on sizes and probabilities."""
        size = self.cross_attention_intermediate_size
        if size is not None and size < 1:
            raise ValueError(f"`cross_attention_intermediate_size` must be positive or None (no MLP), got {size}.")
        if not 0 <= self.cross_attention_dropout < 1:
            raise ValueError(f"`cross_attention_dropout` must be in [0, 1), got {self.cross_attention_dropout}.")
        if self.answer_threshold is not None and not 0 <= self.answer_threshold <= 1:
            raise ValueError(f"`answer_threshold` must be in [0, 1] or None, got {self.answer_threshold}.")
        if self.context_max_length < 1:
            raise ValueError(f"`context_max_length` must be positive, got {self.context_max_length}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"`sliding_window` must be positive or None, got {self.sliding_window}.")

    def validate_context_layer(self):
        """Rule: increasing indices into `output_hidden_states` of what encodes; a prefix of known tokens."""
        layers = self.context_layers
        most = self.num_hidden_layers if self.encoder_config is None else self.encoder_config.num_hidden_layers
        if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] > most:
            raise ValueError(
                f"`context_layer` must be in [0, {most}], a list of distinct, increasing ones, or None (the last), "
                f"got {self.context_layer}."
            )
        if len(layers) > 1 and self.cross_attention_norm != "rms_norm":
            raise ValueError("a list as `context_layer` needs `cross_attention_norm`='rms_norm'.")
        prefix = self.context_prefix
        if prefix is not None and (
            self.encoder_config is not None or not all(0 <= i < self.vocab_size for i in prefix)
        ):
            raise ValueError(
                f"`context_prefix` must be token ids below {self.vocab_size}, and None with a separate encoder, "
                f"got {prefix}."
            )

    def validate_joint_mode(self):
        """Rule: joint mode has the decoder's heads, and none of a block's own parts."""
        rank = self.cross_attention_adapter_rank
        if rank is not None and (rank < 1 or not self.reads_jointly):
            raise ValueError(f"`cross_attention_adapter_rank` must be positive, and needs joint mode, got {rank}.")
        if not self.reads_jointly:
            return
        heads = {
            "cross_attention_num_heads": self.num_attention_heads,
            "cross_attention_num_key_value_heads": self.num_key_value_heads,
            "cross_attention_head_dim": self.head_dim,
        }
        none = ("cross_attention_gate", "cross_attention_intermediate_size")
        false = ("cross_attention_rope", "cross_attention_share_weights")
        wanted = heads | dict.fromkeys(none) | dict.fromkeys(false, False) | {"attention_dropout": 0}
        for field, value in wanted.items():
            if getattr(self, field) != value:
                raise ValueError(
                    f"`cross_attention_mode`='joint' needs `{field}`={value}, got {getattr(self, field)}."
                )

    def _remove_keys_not_serialized(self, d: dict) -> None:
        super()._remove_keys_not_serialized(d)
        d.pop("cross_attn_implementation", None)


XCLlamaConfig.register_for_auto_class()

__all__ = ["XCLlamaConfig"]
