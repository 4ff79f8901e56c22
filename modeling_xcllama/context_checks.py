"""Which caches and projected contexts a model can read, and the fingerprint that says so."""

import torch
from torch import nn

from .context_cache import ContextCache, ProjectedContext
from .effective_weights import effective_weights
from .fingerprint import bits_sample


class ContextChecksMixin:
    """What an `XCLlamaModel` asks before it reads a context."""

    def check_cache(self, cache: ContextCache) -> None:
        """Raise a ValueError that says why, if this model cannot read `cache`."""
        config = self.config
        if cache.layout != config.context_layout:
            raise ValueError(
                f"this cache has layout {cache.layout!r}, the model reads {config.context_layout!r}; encode again."
            )
        width = config.cross_attention_head_dim if cache.layout == "condensed" else config.context_width
        heads = config.cross_attention_num_key_value_heads
        for state in cache.states.values():
            shape = tuple(state.shape[1:])
            expected = (heads, width) if cache.layout == "condensed" else (width,)
            if shape != expected and not (
                cache.is_quantized and cache.layout == "hidden" and shape[0] * shape[1] == width
            ):
                raise ValueError(f"the states of this cache have shape {shape} a token, the model reads {expected}.")
        if cache.fingerprint != self.context_fingerprint():
            raise ValueError(
                "this cache was made by another model, template or version of the weights: its fingerprint is "
                f"{cache.fingerprint}, the model's {self.context_fingerprint()}; encode the contexts again."
            )

    def check_projections(self, context: ProjectedContext) -> None:
        """Raise a ValueError if the weights that projected `context` have changed since."""
        if torch.compiler.is_compiling() or context.weights is None:
            return
        if context.weights != self.projections_sample():
            raise ValueError(
                "the weights that projected these keys and values have changed: call `project_context` again."
            )

    def projections_sample(self) -> bytes:
        """What tells the weights that project contexts from those after a step of training."""
        return bits_sample(effective_weights({"": self.context_projections}).tensors)

    def _encoding_modules(self, layout: str) -> dict[str, nn.Module]:
        """What shapes a context state, by name."""
        if self.encoder is not None:
            modules = {"encoder": self.encoder}
        else:
            layer = self.config.context_layers[-1]
            modules = {"embed_tokens": self.embed_tokens, "rotary_emb": self.rotary_emb, "layers": self.layers[:layer]}
            if layer == self.config.num_hidden_layers:
                modules["norm"] = self.norm
        return modules | ({"context_projections": self.context_projections} if layout == "condensed" else {})

    def context_fingerprint(self, layout: str | None = None) -> str:
        """Digest of all that shapes the cached states: weights as they are now, adapters, fields and template.

        Whatever changes a weight changes it. Computed anew where something changed; see `fingerprint.py` for its cost.

        Args:
            layout: of the states, "hidden" or "condensed"; None: of the caches that this model makes.

        Raises:
            ValueError: weights on the meta device.
        """
        layout = layout or self.config.context_layout
        weights = effective_weights(self._encoding_modules(layout))
        return self._kept_digest.of(weights.tensors, self.config.context_fields(layout) | weights.settings)
