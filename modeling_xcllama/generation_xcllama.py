"""generate() with contexts: encoded and projected once, shared by beams, kept from drafts that cannot read them."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.utils import GenerateOutput
from transformers.modeling_utils import PreTrainedModel

from .context_cache import ContextCache, ProjectedContext
from .context_lookup import LONGEST_MATCH, ContextLookup, ContextLookupCandidateGenerator

CONTEXT_ARGUMENTS = (
    "context_cache",
    "context_input_ids",
    "context_attention_mask",
    "assistant_context_cache",
    "context_lookup_num_tokens",
)


class ContextGenerationMixin:
    """What a causal language model with a context adds to `GenerationMixin`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        context_cache: ContextCache | ProjectedContext | None = None,
        context_input_ids: torch.LongTensor | None = None,
        context_attention_mask: Tensor | None = None,
        assistant_model: PreTrainedModel | None = None,
        assistant_context_cache: ContextCache | ProjectedContext | None = None,
        context_lookup_num_tokens: int | None = None,
        **kwargs,
    ) -> GenerateOutput | torch.LongTensor:
        """`GenerationMixin.generate` from cached contexts: they are encoded and projected once, before the first step.

        Args:
            context_cache, context_input_ids, context_attention_mask: as in `forward`.
            assistant_model: draft model of assisted decoding, XC or not.
            assistant_context_cache: what an XC draft reads; None: the same cache where the draft can read it. A draft
                that is no XC model reads no context.
            context_lookup_num_tokens: draft this many tokens at a time from the context's own text, where the last
                tokens of the answer (`max_matching_ngram_size`, default 4) stand in it, and verify them in one pass.
                Greedy answers stay the same. With `return_dict_in_generate=True` the output's `context_lookup` says
                how many tokens were drafted and accepted (`ContextLookup`). One row only.

        Raises:
            ValueError: a context that does not fit the batch, the model or the draft; a lookup without a context, or
                beside another draft.
        """
        self._check_generation_config(generation_config)
        args = (generation_config, *args)
        given = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), inputs)
        batch = None if given is None else given.shape[0]
        context = self.model.resolve_context(context_cache, context_input_ids, context_attention_mask, batch)
        if context is not None:
            self.model.check_projections(context)
        if assistant_model is not None:
            kwargs["assistant_model"] = assistant_model
        if context is not None:
            draft = draft_context(assistant_model, assistant_context_cache, context)
            kwargs["context_cache"] = context if draft is None else replace(context, assistant=draft)
        elif assistant_context_cache is not None:
            raise ValueError("`assistant_context_cache` needs a `context_cache` for the model itself.")
        if context_lookup_num_tokens is None:
            return super().generate(inputs, *args, **kwargs)
        lookup = self._context_lookup(context, kwargs)
        kwargs["context_cache"] = replace(context, assistant=lookup)
        output = super().generate(inputs, *args, prompt_lookup_num_tokens=context_lookup_num_tokens, **kwargs)
        if not isinstance(output, Tensor):
            output.context_lookup = lookup
        return output

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs) -> dict:
        """`ContinuousMixin.generate_batch`, which reads no contexts.

        Raises:
            ValueError: a context, which continuous batching would leave out; `xcllama serve` batches such rows.
        """
        self._refuse_contexts(kwargs, "`generate_batch` and paged caches read")
        return super().generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(self, generation_config: GenerationConfig | None = None, *args, **kwargs):
        """`ContinuousMixin.init_continuous_batching`, which reads no contexts."""
        self._check_generation_config(generation_config)
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def _check_generation_config(self, generation_config: GenerationConfig | None) -> None:
        for config in filter(None, (generation_config, self.generation_config)):
            self._refuse_contexts(vars(config), "a `GenerationConfig` carries")

    @staticmethod
    def _refuse_contexts(values: dict, subject: str) -> None:
        given = [name for name in CONTEXT_ARGUMENTS if values.get(name) is not None]
        if given:
            raise ValueError(
                f"{subject} no contexts, got `{given[0]}`: pass it to `generate`, where `cache.select([...])` names "
                "the context of each row, or ask `xcllama serve`, whose rows join and leave at every step."
            )

    def _context_lookup(self, context: ProjectedContext | None, kwargs: dict) -> ContextLookup:
        if context is None:
            raise ValueError("`context_lookup_num_tokens` needs a context to look into: pass `context_cache`.")
        if other := [name for name in ("assistant_model", "prompt_lookup_num_tokens") if kwargs.get(name) is not None]:
            raise ValueError(f"`context_lookup_num_tokens` drafts by itself: leave out `{other[0]}`.")
        if self.model.encoder is not None:
            raise ValueError(
                "`context_lookup_num_tokens` needs the decoder's token ids, the cache has its encoder's; leave it out."
            )
        # more rows are refused by assisted decoding
        return ContextLookup(context.cache.row_token_ids(0).long())

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.LongTensor, dict]:
        # beams and returned sequences share their context: only the row numbers are repeated
        context = model_kwargs.get("context_cache")
        if context is not None and expand_size > 1:
            rows = [row for row in range(len(context)) for _ in range(expand_size)]
            model_kwargs["context_cache"] = context.select(rows)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _get_candidate_generator(
        self, *args, generation_config: GenerationConfig, model_kwargs: dict, assistant_model=None, **kwargs
    ) -> CandidateGenerator:
        lookup = getattr(model_kwargs.get("context_cache"), "assistant", None)
        if isinstance(lookup, ContextLookup):
            return ContextLookupCandidateGenerator(
                lookup,
                eos_token_id=generation_config._eos_token_tensor,
                num_output_tokens=generation_config.prompt_lookup_num_tokens,
                max_matching_ngram_size=generation_config.max_matching_ngram_size or LONGEST_MATCH,
                max_length=generation_config.max_length,
            )
        # a draft gets a context of its own, or none; only self-speculation reads the model's
        if assistant_model is not None and "context_cache" in model_kwargs:
            model_kwargs = dict(model_kwargs)
            draft = model_kwargs.pop("context_cache").assistant
            if draft is not None:
                model_kwargs["context_cache"] = draft
        return super()._get_candidate_generator(
            *args,
            generation_config=generation_config,
            model_kwargs=model_kwargs,
            assistant_model=assistant_model,
            **kwargs,
        )

    @torch.no_grad()
    def context_weights(
        self,
        sequences: torch.LongTensor,
        context_cache: ContextCache | ProjectedContext,
        prompt_length: int,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """How much each context token was attended to when the answers were written.

        Args:
            sequences: prompts and answers, as `generate` returns them, `[batch, length]`.
            context_cache: row i is what sequence i read.
            prompt_length: tokens of the (left-padded) prompts; what follows is the answer.
            attention_mask: of the prompts or of the sequences; 0 at padding.

        Returns:
            float32 `[batch, longest context]`: the mean over layers, heads and answer tokens; each row sums to 1, with
            zeros past the end of its context. See `find_evidence` for the characters they stand for.

        Raises:
            ValueError: no answer after the prompt.
        """
        if not 0 < prompt_length < sequences.shape[1]:
            raise ValueError(f"`prompt_length` must be in [1, {sequences.shape[1] - 1}], got {prompt_length}.")
        if attention_mask is not None and attention_mask.shape[1] < sequences.shape[1]:
            missing = sequences.shape[1] - attention_mask.shape[1]
            attention_mask = torch.nn.functional.pad(attention_mask, (0, missing), value=1)
        outputs = self(
            input_ids=sequences[:, :-1],
            attention_mask=None if attention_mask is None else attention_mask[:, :-1],
            context_cache=context_cache,
            use_cache=False,
            output_attentions=True,
            only_context_weights=True,
            logits_to_keep=1,
        )
        # the token at position i is written by what position i - 1 reads
        weights = [layer[:, :, prompt_length - 1 :].mean((1, 2)) for layer in outputs.cross_attentions]
        weights = torch.stack(weights).mean(0)
        # joint reading shares its attention with the row's own tokens
        return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def draft_context(
    assistant: PreTrainedModel | None,
    given: ContextCache | ProjectedContext | None,
    context: ProjectedContext,
) -> ProjectedContext | None:
    """Keys and values that the draft model reads, None: it reads no context.

    Raises:
        ValueError: a cache for a draft that reads none, or an XC draft that cannot read the model's cache.
    """
    reads = hasattr(assistant, "project_context")
    if given is not None and not reads:
        raise ValueError("`assistant_context_cache` needs an XC model as `assistant_model`.")
    if not reads:
        return None
    if given is None:
        try:
            return assistant.project_context(context.cache)
        except ValueError as error:
            raise ValueError(
                f"the draft model cannot read this context ({error}) Give it its own: "
                "`assistant_context_cache=assistant_model.encode_context(...)`."
            ) from error
    return assistant.model.resolve_context(given, None, None, len(context))
