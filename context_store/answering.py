"""One question against a store, with its cost; and how many requests pay for the encoding of a document."""

import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from modeling_xcllama.context_cache import ContextCache

from .counters import Counters
from .readable import ReadableStore
from .searching import Hit

REPEATS = 3


@dataclass
class Answer:
    """The text, the documents it was read from, and what it cost."""

    text: str
    hits: list[Hit]
    cost: Counters
    first_token_seconds: float
    seconds: float


class FirstToken:
    """A streamer that notes when the first new token arrives; `generate` sends the prompt first."""

    def __init__(self):
        self._start, self._calls, self.seconds = perf_counter(), 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take a token of `generate`."""
        self._calls += 1
        if self._calls == 2:
            self.seconds = perf_counter() - self._start

    def end(self) -> None:
        """Nothing to close."""


def ask(
    store: ReadableStore,
    model,
    processor,
    question: str,
    *,
    k: int = 4,
    where: dict | None = None,
    max_new_tokens: int = 32,
) -> Answer:
    """Search, read what was found, and generate an answer from it.

    Raises:
        ValueError: nothing in the store has a word of the question.
    """
    begin = perf_counter()
    with store.request() as cost:
        hits = store.search(question, k, where)
        if not hits:
            raise ValueError(f"no document of the store has a word of the question {question!r:.80}.")
        cache = store.get([hit.id for hit in hits]).join([range(len(hits))])
    inputs = processor(text=[question], return_tensors="pt").to(model.device)
    streamer = FirstToken()
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "streamer": streamer}
    generated = model.generate(**inputs, context_cache=cache, **options)
    text = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    return Answer(text, hits, cost, streamer.seconds, perf_counter() - begin)


@dataclass
class BreakEven:
    """Seconds of reading one document for one question: from the store, in the prompt, from a KV prefix.

    `*_once_seconds` are paid once a document, `*_request_seconds` up to the first token of every request.
    """

    tokens: int
    encode_once_seconds: float
    store_request_seconds: float
    prompt_request_seconds: float
    prefix_once_seconds: float
    prefix_request_seconds: float
    store_bytes: int
    prefix_bytes: int

    @property
    def requests_against_prompt(self) -> float:
        """Requests after which encoding has paid for itself; infinite if it never does."""
        saved = self.prompt_request_seconds - self.store_request_seconds
        return max(1, math.ceil(self.encode_once_seconds / saved)) if saved > 0 else math.inf

    @property
    def requests_against_prefix(self) -> tuple[float, float]:
        """From the how manieth request on, and up to which, encoding is the cheaper against a KV prefix on disk."""
        extra = self.encode_once_seconds - self.prefix_once_seconds
        saved = self.prefix_request_seconds - self.store_request_seconds
        if saved > 0:
            return max(1, math.ceil(extra / saved)), math.inf
        if extra >= saved:
            return math.inf, math.inf
        return 1, math.inf if saved == 0 else math.floor(extra / saved)

    def as_dict(self) -> dict:
        """The figures, and the requests that pay for encoding; None: never, or without an end."""
        requests = (self.requests_against_prompt, *self.requests_against_prefix)
        names = ("pays_against_prompt_from", "pays_against_prefix_from", "pays_against_prefix_up_to")
        return asdict(self) | {n: None if math.isinf(r) else r for n, r in zip(names, requests, strict=True)}

    def lines(self) -> list[str]:
        """The figures as text."""

        first, last = self.requests_against_prefix
        until = "" if math.isinf(last) else f" up to the {last}th"
        prompt = self.requests_against_prompt
        return [
            f"document of {self.tokens} tokens: {self.store_bytes} bytes stored, {self.prefix_bytes} as KV prefix",
            f"once:    encode {self.encode_once_seconds:.3f} s, KV prefix {self.prefix_once_seconds:.3f} s",
            f"request: store {self.store_request_seconds:.3f} s, prompt {self.prompt_request_seconds:.3f} s, "
            f"KV prefix {self.prefix_request_seconds:.3f} s to the first token",
            "break-even against the prompt: " + ("never" if math.isinf(prompt) else f"request {prompt}"),
            "break-even against a KV prefix: " + ("never" if math.isinf(first) else f"request {first}{until}"),
        ]


def _timed(function, repeats: int = REPEATS) -> float:
    seconds = []
    function()
    for _ in range(repeats):
        begin = perf_counter()
        function()
        seconds.append(perf_counter() - begin)
    return median(seconds)


@torch.no_grad()
def break_even(store: ReadableStore, model, processor, document_id: str, question: str) -> BreakEven:
    """Measure, on this machine, what a document costs to read in each way; medians of three runs after a warm-up.

    Args:
        document_id: in the store.
        question: asked of it.
    """
    text = store.catalogue.text(document_id)[0]
    context = processor(contexts=[text], return_tensors="pt").to(model.device)
    inputs = processor(text=[question], return_tensors="pt").to(model.device)
    in_prompt = processor(text=[f"{text}\n\n{question}"], return_tensors="pt").to(model.device)
    prefix = processor.tokenizer(text, return_tensors="pt").to(model.device)

    def first_token(**arguments) -> None:
        model(**arguments, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()

    def build_prefix() -> DynamicCache:
        return model(**prefix, use_cache=True, logits_to_keep=1).past_key_values

    layers = build_prefix().layers
    tensors = {
        f"{i}.{n}": getattr(layer, n).contiguous() for i, layer in enumerate(layers) for n in ("keys", "values")
    }
    mask = torch.ones(1, prefix["input_ids"].shape[1] + inputs["input_ids"].shape[1], dtype=torch.long)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prefix.safetensors")
        save_file(tensors, path)

        def from_prefix() -> None:
            loaded, past = load_file(path, device=str(model.device)), DynamicCache()
            for layer in range(len(layers)):
                past.update(loaded[f"{layer}.keys"], loaded[f"{layer}.values"], layer)
            first_token(input_ids=inputs["input_ids"], attention_mask=mask.to(model.device), past_key_values=past)

        prefix_request = _timed(from_prefix)
        prefix_bytes = os.path.getsize(path)
    cache: ContextCache = store.get(document_id)
    return BreakEven(
        tokens=cache.num_tokens,
        encode_once_seconds=_timed(lambda: model.encode_context(**context)),
        store_request_seconds=_timed(lambda: first_token(**inputs, context_cache=store.get(document_id))),
        prompt_request_seconds=_timed(lambda: first_token(**in_prompt)),
        prefix_once_seconds=_timed(build_prefix),
        prefix_request_seconds=prefix_request,
        store_bytes=cache.nbytes,
        prefix_bytes=prefix_bytes,
    )
