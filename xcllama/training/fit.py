"""A reader of cached contexts around any Llama-family decoder, in minutes and without training.

The context projections are set by least squares (`modeling_xcllama.least_squares`). How well a prompt is still read,
and what each layer brings, is measured on texts that were held out: the loss of the second half of a text whose first
half is cached, between that with the first half in the prompt and that without it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor
from modeling_xcllama.checkpoints import find_model
from modeling_xcllama.context_cache import ProjectedContext
from modeling_xcllama.least_squares import fit_least_squares
from xcllama.progress import tracked
from xcllama.training.teacher import Teacher

logger = logging.get_logger(__name__)

# texts kept from the fit to measure it, and the most tokens of a text that are used at a time
HELD_OUT, MOST_TOKENS = 16, 512
# of the decoder's layers, how far up the cached states stand: what copies has been written by then
DEPTH = 0.6


@dataclass(frozen=True)
class FitReport:
    """What a fit gives, to print and to keep.

    Args:
        r_squared: of keys and values, by layer.
        loss_cached, loss_prompt, loss_without: nats a token of held-out text after a first half that is cached, in the
            prompt, absent.
        gain: by layer, how much the loss rises when that layer alone does not read.
        num_tokens: tokens of the texts that were fitted.
    """

    r_squared: dict[int, float]
    loss_cached: float
    loss_prompt: float
    loss_without: float
    gain: dict[int, float]
    num_tokens: int

    @property
    def share(self) -> float:
        """Of what the prompt brings, the share that the cache brings."""
        return (self.loss_without - self.loss_cached) / (self.loss_without - self.loss_prompt)


def fit_reader(
    base: str | Path, texts: Iterable[str], output: str | Path, rank_layers: bool = True, **config_overrides
) -> FitReport:
    """Fit a joint reader on `base` and write it as a folder of added weights.

    Args:
        base: folder or Hub id of a Llama-family causal language model.
        texts: what is like the texts that will be cached; 20,000 tokens or more.
        output: folder of added weights, see `XCLlamaForCausalLM.save_cross_attention`.
        rank_layers: measure what each layer brings (one pass over the held-out texts a layer).
        config_overrides: fields of `XCLlamaConfig`.

    Raises:
        ValueError: fewer than two texts of 32 tokens, or fields that do not fit.
    """
    name = find_model(str(base))
    decoder = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    processor = XCLlamaProcessor(AutoTokenizer.from_pretrained(name))
    tokenized = (processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts)
    pieces = [ids[start : start + MOST_TOKENS] for ids in tokenized for start in range(0, len(ids), MOST_TOKENS)]
    pieces = [ids for ids in pieces if len(ids) >= 32]
    if len(pieces) < 2:
        raise ValueError(f"a fit needs at least two texts of 32 tokens, got {len(pieces)}; name a folder with more.")
    held_out, fitted = pieces[:: max(2, len(pieces) // HELD_OUT)], []
    kept = {id(ids) for ids in held_out}
    fitted = [ids for ids in pieces if id(ids) not in kept]
    fields = {
        "cross_attention_mode": "joint",
        "context_layer": max(1, round(DEPTH * decoder.config.num_hidden_layers)),
        "context_prefix": processor.context_prefix(),
        "base_model_name_or_path": str(base),
    }
    model = XCLlamaForCausalLM.from_decoder(decoder, init="random", **(fields | config_overrides)).eval()
    scores = fit_least_squares(model, tracked(fitted, "least squares, texts"))
    report = measure(model, Teacher(decoder, model.config.context_prefix), held_out, scores, rank_layers)
    model.save_cross_attention(output)
    if processor.chat_template:
        (Path(output) / "chat_template.jinja").write_text(processor.chat_template)
    return replace(report, num_tokens=sum(map(len, fitted)))


class HeldOut:
    """Texts whose first halves are read, and whose second halves are predicted.

    Args:
        texts: token ids.
        prefix: `context_prefix` of the readers.
    """

    def __init__(self, texts: list[list[int]], prefix: list[int] | None):
        self.halves = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in texts]
        self.prefix = prefix or []

    @torch.no_grad()
    def cached(self, model: XCLlamaForCausalLM) -> list[ProjectedContext]:
        """The first halves, from the caches of a model."""
        contexts = [model.encode_context(torch.tensor([first], device=model.device)) for first, _ in self.halves]
        return [model.project_context(context) for context in contexts]

    @torch.no_grad()
    def loss(
        self, reader: PreTrainedModel, contexts: Sequence[ProjectedContext | None], places: Iterable[int] | None = None
    ) -> float:
        """Mean loss of the tokens of the second halves but their first, in nats.

        Args:
            contexts: what is read before each.
            places: of the layers that read, those that do (None: all).
        """
        total, count = 0.0, 0
        for (_, ids), context in zip(self.halves, contexts, strict=True):
            rows = torch.tensor([self.prefix + ids], device=reader.device)
            labels = rows.clone()
            labels[:, : len(self.prefix) + 1] = -100
            read = context if places is None else _read_by(context, set(places))
            total += float(reader(rows, labels=labels, context_cache=read, use_cache=False).loss) * (len(ids) - 1)
            count += len(ids) - 1
        return total / count


def measure(
    model: XCLlamaForCausalLM, teacher: Teacher, texts: list[list[int]], scores: dict[int, float], rank_layers: bool
) -> FitReport:
    """The losses of `texts` (token ids), and what each layer brings."""
    held_out = HeldOut(texts, model.config.context_prefix)
    contexts = held_out.cached(model)
    exact = [teacher.read([torch.tensor(first)], (0,)) for first, _ in held_out.halves]
    cached = held_out.loss(model, contexts)
    gain = gains(held_out, model, contexts, cached) if rank_layers else {}
    nothing = [None] * len(contexts)
    return FitReport(scores, cached, held_out.loss(teacher.model, exact), held_out.loss(model, nothing), gain, 0)


def gains(
    held_out: HeldOut, model: XCLlamaForCausalLM, contexts: list[ProjectedContext], loss: float
) -> dict[int, float]:
    """By reading layer, how much `loss` rises when that layer alone does not read."""
    layers = model.config.cross_attention_layers
    found = {}
    for place, layer in enumerate(tracked(layers, "what each layer brings, layers")):
        others = [other for other in range(len(layers)) if other != place]
        found[layer] = held_out.loss(model, contexts, others) - loss
    return found


def _read_by(context: ProjectedContext, places: set[int]) -> ProjectedContext:
    """`context` with nothing for layers at other places."""
    parts = [
        tuple(part if place in places else None for place, part in enumerate(packed))
        for packed in (context.keys, context.values)
    ]
    return replace(context, keys=parts[0], values=parts[1])
