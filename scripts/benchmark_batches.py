"""Many rows at a time, encoding of mixed lengths, and answers that quote the context."""

import random

import torch
from benchmark_requests import generate, prefix_cache
from benchmark_setup import SEED, Models, peak_bytes, seconds_of, spread
from transformers import DynamicCache, LogitsProcessor

from modeling_xcllama import ContextCache
from modeling_xcllama.context_encoding import pad_right

STEPS = 8
QUOTED_TOKENS = 64


def measure_batch(models: Models, num_tokens: int, rows: int, with_prefix: bool) -> dict:
    """Tokens a second of `rows` requests on one document, on a document each, and over repeated KV prefixes."""
    document, question = models.document(num_tokens), models.question.repeat(rows, 1)
    caches = {"": models.hidden.encode_context(document), ", condensed": models.condensed.encode_context(document)}
    caches[", int8"] = caches[""].quantize("int8")
    contexts = {
        f"shared{name}": (models.condensed if "condensed" in name else models.hidden, cache.select([0] * rows))
        for name, cache in caches.items()
    }
    if rows > 1:
        # the same states at other places: what is read is not the same memory
        each = ContextCache.concat([_copied(caches[""]) for _ in range(rows)])
        contexts["one each"] = (models.hidden, each)
    found = {}
    for name, (model, cache) in contexts.items():
        context, clocks = model.project_context(cache), []

        def run(model=model, context=context, clocks=clocks) -> None:
            clocks.append(generate(model, question, STEPS, context_cache=context))

        found[name] = _batch_figures(rows, peak_bytes(run), clocks[0].steps, context.nbytes)
    if with_prefix:
        prefix = prefix_cache(models, document)
        prefix.batch_repeat_interleave(rows)
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.layers)
        steps: list[float] = []
        peak = peak_bytes(lambda: steps.extend(_prefix_steps(models, prefix, rows)))
        found["KV prefix each"] = _batch_figures(rows, peak, steps, size)
    return found


def _copied(cache: ContextCache) -> ContextCache:
    states = {name: state.clone() for name, state in cache.states.items()}
    return ContextCache(states, cache.offsets, cache.token_ids, cache.fingerprint)


def _prefix_steps(models: Models, prefix: DynamicCache, rows: int) -> list[float]:
    token = models.question[:, -1:].repeat(rows, 1)
    with torch.no_grad():
        return seconds_of(lambda: models.base(token, past_key_values=prefix), 4)


def _batch_figures(rows: int, peak: int, steps: list[float], context_bytes: int) -> dict:
    # the first step after the prefill warms up
    seconds = spread(steps[1:])
    return {
        "step_seconds": seconds,
        "tokens_per_second": rows / seconds["median"],
        "context_bytes": context_bytes,
        "peak_bytes": peak,
    }


def measure_encoding(models: Models, documents: int, rounds: int = 3) -> dict:
    """Tokens a second of mixed lengths: ours, padded batches as deep as ours, and the whole model with logits."""
    generator = random.Random(SEED)
    lengths = [int(64 * 16 ** generator.random()) for _ in range(documents)]
    sequences = [models.document(length, 37 * index)[0] for index, length in enumerate(lengths)]
    ids, mask = pad_right(sequences)
    layer = models.hidden.config.context_layer
    batches = [pad_right(sequences[start : start + 16]) for start in range(0, documents, 16)]

    def padded(whole: bool) -> None:
        with torch.no_grad():
            for batch_ids, batch_mask in batches:
                if whole:
                    models.base(batch_ids, attention_mask=batch_mask, output_hidden_states=True, use_cache=False)
                else:
                    _first_layers(models, layer, batch_ids, batch_mask)

    runs = {
        "ours": lambda: models.hidden.encode_context(ids, mask),
        "plain padded batches of 16, as many layers": lambda: padded(False),
    }
    taken = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name] += seconds_of(run, 1)
    taken["plain padded batches of 16, whole model"] = seconds_of(lambda: padded(True), 1)
    total = sum(lengths)
    return {
        "documents": documents,
        "tokens": total,
        "pairs": sum(length**2 for length in lengths),
        "longest": max(lengths),
        "tokens_per_second": {name: total / spread(seconds)["median"] for name, seconds in taken.items()},
    }


def _first_layers(models: Models, layer: int, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """The decoder's first layers in transformers' own forward."""
    decoder = models.base.model
    layers = decoder.layers
    decoder.layers = layers[:layer]
    kept, decoder.config.num_hidden_layers = decoder.config.num_hidden_layers, layer
    try:
        decoder(ids, attention_mask=mask, use_cache=False)
    finally:
        decoder.layers, decoder.config.num_hidden_layers = layers, kept


class Dictated(LogitsProcessor):
    """Make the model write `answer`: a quotation of known length, whatever the weights would say."""

    def __init__(self, prompt_length: int, answer: torch.Tensor):
        self.prompt_length, self.answer = prompt_length, answer

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        position = min(input_ids.shape[1] - self.prompt_length, len(self.answer) - 1)
        scores[:, self.answer[position]] = torch.finfo(scores.dtype).max
        return scores


def measure_lookup(models: Models, num_tokens: int, rounds: int, num_lookup: int = 10) -> dict:
    """A quotation of 64 tokens of the context, decoded plainly and with context lookup, in turns."""
    model, question = models.hidden, models.question
    cache = model.encode_context(models.document(num_tokens))
    context = model.project_context(cache)
    answer = cache.token_ids[num_tokens // 2 :][:QUOTED_TOKENS].long()
    options = {"context_cache": context, "logits_processor": [Dictated(question.shape[1], answer)]}
    options |= {"eos_token_id": None, "return_dict_in_generate": True}
    seconds, outputs = {"plain": [], "lookup": []}, {}
    for _ in range(rounds):
        for name in seconds:
            extra = {"context_lookup_num_tokens": num_lookup} if name == "lookup" else {}

            def run(name: str = name, extra: dict = extra) -> None:
                outputs[name] = model.generate(
                    question, max_new_tokens=QUOTED_TOKENS, do_sample=False, **options, **extra
                )

            seconds[name] += seconds_of(run, 1)
    lookup = outputs["lookup"].context_lookup
    return {
        "answer_tokens": QUOTED_TOKENS,
        "tokens_identical": torch.equal(outputs["plain"].sequences, outputs["lookup"].sequences),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "drafted": lookup.drafted,
        "accepted": lookup.accepted,
        "passes": lookup.passes,
        "ratio": spread(seconds["plain"])["median"] / spread(seconds["lookup"])["median"],
    }
