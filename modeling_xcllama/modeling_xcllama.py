"""XC-Llama: a frozen Llama decoder that reads cached contexts through added cross-attention (arXiv 2404.15420)."""

import copy
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple, logging

from .added_modules import ADDED_PREFIXES
from .atomic_file import save_tensors
from .checkpoints import AUTO_CLASSES, AUTO_CODE, AUTO_FILE, WEIGHTS_NAME, from_added_weights, is_added_weights
from .configuration_xcllama import XCLlamaConfig
from .context_cache import ContextCache, ProjectedContext
from .context_encoding import bare_encoder
from .cross_attention import log_implementation
from .decoder_xcllama import XCLlamaModel, XCLlamaPreTrainedModel
from .fingerprint import weights_digest
from .generation_xcllama import ContextGenerationMixin
from .least_squares import fit_least_squares
from .pipeline_xcllama import custom_pipelines, register_pipeline
from .warm_start import copy_self_attention, zero_gates
from .wide_products import wide_products

logger = logging.get_logger(__name__)

DECODER_TYPES = ("llama", "mistral")
INITIALIZATIONS = ("self_attention", "zero", "random", "least_squares")


class XCLlamaForCausalLM(ContextGenerationMixin, XCLlamaPreTrainedModel, LlamaForCausalLM):
    """Llama for causal language modeling that reads a context cache."""

    def __init__(self, config: XCLlamaConfig):
        # not LlamaForCausalLM.__init__, which would build a second decoder only to throw it away
        XCLlamaPreTrainedModel.__init__(self, config)
        self.model = XCLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        # `pipeline(TASK, model=model)` finds it for a model that is there
        register_pipeline()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        context_cache: ContextCache | ProjectedContext | None = None,
        context_input_ids: torch.LongTensor | None = None,
        context_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """Logits of `input_ids` `[batch, length]`, and the loss where `labels` (-100: not counted) are given.

        Args:
            context_cache: what row i reads is row i of it; a `ContextCache`, or keys and values of `project_context`.
            context_input_ids: contexts to encode for this call, `[batch, context_length]`, instead of a cache.
            context_attention_mask: 0 at padding of `context_input_ids`.
            logits_to_keep: as in `LlamaForCausalLM`.

        Raises:
            ValueError: a context that does not fit the batch or the model.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        with wide_products(self.model.norm.weight, tokens.numel()):
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                context_cache=context_cache,
                context_input_ids=context_input_ids,
                context_attention_mask=context_attention_mask,
                **kwargs,
            )
            kept = states_to_keep(outputs.last_hidden_state, logits_to_keep)
            # as a matrix: for a slice of a batch, torch copies the weight of the head, once a row
            logits = self.lm_head(kept.reshape(-1, kept.shape[-1])).unflatten(0, kept.shape[:-1])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )

    def encode_context(self, context_input_ids: Tensor, context_attention_mask: Tensor | None = None) -> ContextCache:
        """See `XCLlamaModel.encode_context`."""
        return self.model.encode_context(context_input_ids, context_attention_mask)

    def project_context(self, cache: ContextCache) -> ProjectedContext:
        """See `XCLlamaModel.project_context`."""
        return self.model.project_context(cache)

    def load_context(self, path: str | Path) -> ContextCache:
        """Map the cache in a file and check that this model can read it.

        Raises:
            ValueError: a damaged file, or a cache of another model, template, layout or width.
            FileNotFoundError: no such file.
        """
        cache = ContextCache.load(path)
        self.model.check_cache(cache)
        return cache

    def added_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and weights of the cross-attention modules."""
        return ((name, weight) for name, weight in self.named_parameters() if name.startswith(ADDED_PREFIXES))

    def freeze_base(self) -> None:
        """Leave gradients to the cross-attention modules and, where there is one, the separate encoder."""
        for name, weight in self.named_parameters():
            trained = name.startswith((*ADDED_PREFIXES, "model.encoder."))
            weight.requires_grad_(trained and weight.is_floating_point())

    def added_digest(self) -> str:
        """Digest of the cross-attention modules' weights."""
        return weights_digest(self.added_parameters())

    def base_digest(self) -> str:
        """Digest of the frozen decoder's weights, sampled: it costs little at every load."""
        added = (*ADDED_PREFIXES, "model.encoder.")
        base = ((name, weight) for name, weight in self.named_parameters() if not name.startswith(added))
        return weights_digest(base, sampled=True)

    @classmethod
    @torch.inference_mode(False)
    def from_decoder(
        cls,
        base: str | Path | PreTrainedModel,
        encoder: str | Path | PreTrainedModel | None = None,
        *,
        init: str = "self_attention",
        texts: Iterable[str] | Iterable[list[int]] | None = None,
        dtype: torch.dtype | str = "auto",
        **config_overrides,
    ) -> "XCLlamaForCausalLM":
        """An XC model around a Llama-family checkpoint; the base's weights are shared, not copied, and frozen.

        Args:
            base: model, folder or Hub id of a causal language model of type llama or mistral.
            encoder: model, folder or Hub id of a Hugging Face encoder (XC-LlamaEnc); None: the decoder encodes.
            init: "self_attention" copies the decoder's projections, "least_squares" fits the context projections to
                its keys and values of `texts` (no training), "zero" closes the gates, "random".
            texts: for "least_squares": texts as they will be cached (the base's tokenizer is loaded), or their token
                ids; about 20,000 tokens are enough for a small decoder.
            dtype: for a base or encoder that is loaded here.
            config_overrides: fields of `XCLlamaConfig`.

        Raises:
            ValueError: unknown `init`, a base of another family, or config fields that do not fit.
        """
        if init not in INITIALIZATIONS:
            raise ValueError(f"`init` must be one of {', '.join(map(repr, INITIALIZATIONS))}, got {init!r}.")
        if (init == "least_squares") != (texts is not None):
            raise ValueError("`texts` and init='least_squares' go together: give both or none.")
        if not isinstance(base, PreTrainedModel):
            base = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        if base.config.model_type not in DECODER_TYPES:
            raise ValueError(
                f"`base` must be a causal language model of type {' or '.join(DECODER_TYPES)}, "
                f"got {base.config.model_type!r}."
            )
        if encoder is not None and not isinstance(encoder, PreTrainedModel):
            encoder = AutoModel.from_pretrained(encoder, dtype=base.dtype)
        config = config_from_decoder(base, encoder, config_overrides)
        with torch.device("meta"):
            model = cls(config)
        model.to(base.dtype)
        device = base.get_input_embeddings().weight.device
        if encoder is not None:
            model.model.encoder = bare_encoder(encoder)
        _share_weights(base, model)
        # buffers made on the meta device hold nothing
        for name in ("rotary_emb", "cross_rotary_emb"):
            if (rotary := getattr(model.model, name)) is not None:
                setattr(model.model, name, LlamaRotaryEmbedding(rotary.config).to(device))
        inner = model.model
        for modules in (inner.cross_attention_blocks, inner.context_projections, inner.context_adapters):
            modules.to_empty(device=device)
            modules.apply(model._init_weights)
        if init == "self_attention":
            copy_self_attention(model.model)
        elif init == "zero":
            zero_gates(model.model)
        elif init == "least_squares":
            scores = fit_least_squares(model, token_ids(texts, base))
            logger.info(f"least squares, R2 by layer: { {layer: round(score, 3) for layer, score in scores.items()} }")
        model.generation_config = base.generation_config
        model.freeze_base()
        log_implementation(config.cross_attn_implementation, device)
        return model.train(base.training)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args,
        base: str | PreTrainedModel | None = None,
        **kwargs,
    ):
        """`PreTrainedModel.from_pretrained`, also of added weights; the decoder comes frozen, as from `from_decoder`.

        Args:
            pretrained_model_name_or_path: Hub id or folder of a whole model, or a folder of added weights
                (`save_cross_attention`), whose config names its base.
            base: model, folder or Hub id of the decoder that added weights are put on, in place of their base.
            kwargs: a `quantization_config` quantizes the decoder and leaves the added modules in 16 bit.

        Raises:
            ValueError: `base` for a whole model, or added weights that do not fit their base.
        """
        if is_added_weights(pretrained_model_name_or_path):
            return from_added_weights(cls, pretrained_model_name_or_path, base, **kwargs)
        if base is not None:
            raise ValueError(f"`base` is for added weights, {pretrained_model_name_or_path} is a whole model.")
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_base()
        log_implementation(model.config.cross_attn_implementation, model.device)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """`PreTrainedModel.save_pretrained` with the code that remote loading needs."""
        self.config.auto_map = {"AutoModel": "modeling_xcllama.XCLlamaModel"}
        self.config.custom_pipelines = custom_pipelines("pipeline_xcllama")
        super().save_pretrained(save_directory, **kwargs)

    def save_cross_attention(self, path: str | os.PathLike) -> None:
        """Write the trained weights only (cross-attention, and an encoder's that require gradients) and the config.

        Args:
            path: a folder, made if needed; gets config.json, cross_attention.safetensors, and a file that lets the
                Auto classes find the code in the installed package.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.context_fingerprint = self.model.context_fingerprint()
        self.config.base_model_digest = self.base_digest()
        tensors = {name: weight.detach().contiguous().cpu() for name, weight in self.added_parameters()}
        for name, weight in self.named_parameters():
            if name.startswith("model.encoder.") and weight.requires_grad:
                tensors[name] = weight.detach().contiguous().cpu()
        # as `save_pretrained` does: the dtype of what is saved, whatever the frozen weights have
        for config in filter(None, (self.config, self.config.encoder_config)):
            config.dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        save_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
        saved = copy.deepcopy(self.config)
        saved.auto_map = {auto: f"{AUTO_FILE}.{name}" for auto, name in AUTO_CLASSES.items()}
        saved.custom_pipelines = custom_pipelines(AUTO_FILE)
        saved.to_json_file(folder / "config.json")
        (folder / f"{AUTO_FILE}.py").write_text(AUTO_CODE)

    def load_cross_attention(self, path: str | os.PathLike) -> None:
        """Load what `save_cross_attention` wrote into this model.

        Raises:
            ValueError: other cross-attention fields, or other names or shapes of weights.
        """
        folder = Path(path)
        # what an older config does not name has its default
        configs = XCLlamaConfig.from_pretrained(folder), self.config
        saved, ours = (json.loads(config.to_json_string(use_diff=False)) for config in configs)
        for field in ours:
            if field.startswith("cross_attention_") or field in (
                "context_layer",
                "context_prefix",
                "template_version",
            ):
                if saved.get(field) != ours[field]:
                    raise ValueError(f"{folder} has `{field}`={saved.get(field)!r}, this model {ours[field]!r}.")
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        own = dict(self.named_parameters())
        wrong = {name for name, _ in self.added_parameters()} - set(tensors)
        wrong |= {name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape}
        if wrong:
            raise ValueError(f"{folder / WEIGHTS_NAME} does not fit this model: {', '.join(sorted(wrong))}.")
        if saved.get("base_model_digest") not in (None, self.base_digest()):
            logger.warning(
                f"{folder} was trained on a decoder with other weights than this one (digest "
                f"{saved['base_model_digest'][:12]}): its answers may be worse."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)


def states_to_keep(states: Tensor, kept: int | Tensor) -> Tensor:
    """The states of `logits_to_keep`: the last positions (0: all), or positions or a mask, of all rows or of each."""
    if isinstance(kept, int):
        return states[:, -kept:]
    if kept.dim() == 1:
        return states[:, kept]
    return states[kept] if kept.dtype == torch.bool else states.take_along_dim(kept[..., None], dim=1)


def token_ids(texts: Iterable[str] | Iterable[list[int]], base: PreTrainedModel) -> Iterator[list[int]]:
    """Token ids of texts by the tokenizer of `base`; ids as they are."""
    tokenizer = None
    for text in texts:
        if isinstance(text, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(base.config._name_or_path)
            text = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        yield list(text)


def config_from_decoder(base: PreTrainedModel, encoder: PreTrainedModel | None, overrides: dict) -> XCLlamaConfig:
    """The config of an XC model on `base`, with `overrides`."""
    inherited = base.config.to_dict()
    fields = XCLlamaConfig.__dataclass_fields__
    values = {key: inherited[key] for key in inherited if key in fields and key not in ("architectures", "model_type")}
    values["dtype"] = base.dtype
    values.setdefault("base_model_name_or_path", base.config._name_or_path or None)
    if encoder is not None:
        values |= {"encoder_config": encoder.config, "encoder_name_or_path": encoder.config._name_or_path or None}
    if unknown := sorted(set(overrides) - set(fields)):
        raise ValueError(f"`XCLlamaConfig` has no field {', '.join(unknown)}; see its docstring.")
    config = XCLlamaConfig(**(values | overrides))
    # the decoder's choice alone: not every encoder has every implementation
    config._attn_implementation = {"": base.config._attn_implementation}
    return config


def _share_weights(base: PreTrainedModel, model: XCLlamaForCausalLM) -> None:
    """Put the base's own parameters into `model`, and its modules where they are quantized."""
    for name, module in base.named_modules():
        ours = model.get_submodule(name)
        if isinstance(ours, nn.Linear) and type(module) is not nn.Linear:
            model.set_submodule(name, module)
    for name, weight in base.named_parameters(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, weight)


XCLlamaModel.register_for_auto_class("AutoModel")
XCLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["XCLlamaForCausalLM", "XCLlamaModel"]
