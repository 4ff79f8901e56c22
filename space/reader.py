"""The model as the Space uses it: encodes texts by sections, streams answers, tells what was attended to."""

import queue
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from time import perf_counter

import torch
from documents import DocumentError
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from visitors import Document

SECTION_TOKENS = 1024
MAX_QUESTION_TOKENS = 256
# pairs of a token and a context token whose attention is looked at; each takes 300 bytes in the small model
MAX_ATTENTION_PAIRS = 2**21
# where a section may end, best first
BREAKS = ("\n\n", "\n", ". ", " ")


@dataclass(frozen=True)
class Answer:
    """An answer as far as it is written.

    Args:
        text: so far.
        num_tokens: tokens written.
        first_token_seconds: from the start of the work, not of the wait for it, to the first token.
        seconds: from the start to the last token.
        weights: share of the attention of each context token, `[num_context_tokens]`; None before the answer is
            complete, and where no context was read or too much of it.
        complete: the last state.
    """

    text: str
    num_tokens: int
    first_token_seconds: float
    seconds: float
    weights: Tensor | None = None
    complete: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Rate after the first token; 0 where there is only one."""
        return (self.num_tokens - 1) / (self.seconds - self.first_token_seconds) if self.num_tokens > 1 else 0.0


class AnswerStreamer(BaseStreamer, StoppingCriteria):
    """Puts the answer into a queue after every token, and ends it when nobody waits for it any more."""

    def __init__(self, tokenizer):
        self.states: queue.Queue[Answer | None] = queue.Queue()
        self.left = threading.Event()
        self._tokenizer, self._ids, self._prompt_seen = tokenizer, [], False
        self.start, self._first = perf_counter(), 0.0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        now = perf_counter() - self.start
        self._first = self._first or now
        self._ids += value.reshape(-1).tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        # half of a character that takes several tokens
        self.states.put(Answer(text.rstrip("\ufffd").strip(), len(self._ids), self._first, now))

    def end(self) -> None:
        """The last state is on its way already."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return torch.full((input_ids.shape[0],), self.left.is_set(), device=input_ids.device)


class Reader:
    """A model and its processor behind one thread, which takes sections and answers in the order they come.

    Args:
        model, processor: XC-Llama, as from the Auto classes.
        max_new_tokens: most tokens of an answer.
        max_prompt_tokens: most tokens of a text that is read in the prompt.
        max_document_tokens: most tokens of a document.
    """

    def __init__(
        self,
        model,
        processor,
        max_new_tokens: int = 48,
        max_prompt_tokens: int = 4096,
        max_document_tokens: int = 16384,
    ):
        self.model, self.processor = model, processor
        self.max_new_tokens, self.max_document_tokens = max_new_tokens, max_document_tokens
        self.max_prompt_tokens = min(max_prompt_tokens, model.config.max_position_embeddings - max_new_tokens)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        # a tokenizer must not be set up for two texts at once
        self._tokenizing = threading.Lock()
        self.bytes_per_token = self._bytes_per_token()

    def _bytes_per_token(self) -> dict[str, float]:
        """What a token costs in memory, by kind of cache."""
        config = self.model.config
        values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        cache = self.model.encode_context(**self._process(contexts=["one two three"]))
        return {
            "KV cache of the decoder": float(values * self.model.dtype.itemsize),
            "context cache": cache.bytes_per_token,
            "context cache, int8": cache.quantize("int8").bytes_per_token,
            "context cache, int4": cache.quantize("int4").bytes_per_token,
        }

    def _process(self, **options) -> dict:
        with self._tokenizing:
            return self.processor(**options, return_tensors="pt")

    def _tokenize(self, prompt: str) -> dict:
        with self._tokenizing:
            return self.processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)

    def count_tokens(self, text: str, name: str) -> int:
        """Tokens of a text.

        Raises:
            DocumentError: more than a document may have.
        """
        # no tokenizer makes tokens of more than some dozen letters on average
        count = len(text) if len(text) > 32 * self.max_document_tokens else self._spans(text).shape[0]
        if count > self.max_document_tokens:
            raise DocumentError(
                f"“{name}” is too long: {len(text):,} letters. A document may have "
                f"{self.max_document_tokens:,} tokens, about {4 * self.max_document_tokens:,} letters: add parts."
            )
        return count

    def _spans(self, text: str) -> Tensor:
        return self._process(contexts=[text], return_offsets_mapping=True)["context_offset_mapping"][0].int()

    def sections(self, text: str) -> list[tuple[int, int]]:
        """Characters of each section, about `SECTION_TOKENS` tokens or fewer; cut between paragraphs if possible."""
        starts = self._spans(text)[:, 0].tolist()
        cuts = [0]
        while (position := bisect_left(starts, cuts[-1]) + SECTION_TOKENS) < len(starts):
            # not before the middle: sections would become too small
            low, high = starts[position - SECTION_TOKENS // 2], starts[position]
            cuts.append(_last_break(text, low, high))
        return list(zip(cuts, [*cuts[1:], len(text)], strict=True))

    def encode(self, name: str, text: str, report: Callable[[float], None] = lambda share: None) -> Document:
        """Encode a text, a section at a time, so that others get their turn in between.

        Args:
            name: of the document.
            text: to encode.
            report: gets the share that is done, 0 to 1.
        """
        encoded, spans, starts = [], [], []
        sections = self.sections(text)
        for number, (first, last) in enumerate(sections):
            report(number / len(sections))
            inputs = self._process(contexts=[text[first:last]], return_offsets_mapping=True)
            starts.append(sum(len(part) for part in spans))
            spans.append(inputs.pop("context_offset_mapping")[0].int() + first)
            encoded.append(self._worker.submit(self._encode, inputs).result())
        report(1.0)
        caches, seconds = zip(*encoded, strict=True)
        return Document(name, text, caches[0].concat(caches), torch.cat(spans), tuple(starts), sum(seconds))

    def _encode(self, inputs: dict) -> tuple:
        start = perf_counter()
        return self.model.encode_context(**inputs), perf_counter() - start

    def answer_from_cache(self, question: str, documents: Sequence[Document]) -> Iterator[Answer]:
        """The states of an answer that is read from the caches of `documents`; the last one has the weights."""
        self._check_question(question)
        return self._stream(lambda streamer: self._from_cache(question, documents, streamer))

    def answer_from_prompt(self, question: str, documents: Sequence[Document]) -> Iterator[Answer]:
        """The states of an answer of the decoder alone, the texts of `documents` in its prompt.

        Raises:
            DocumentError: texts that are too long for a prompt.
        """
        self._check_question(question)
        text = "\n\n".join(document.text for document in documents)
        inputs = self._tokenize(self.processor.prompts([f"{text}\n\n{question}" if text else question])[0])
        length = inputs["input_ids"].shape[1]
        if length > self.max_prompt_tokens:
            raise DocumentError(
                f"The prompt would have {length:,} tokens; this Space reads {self.max_prompt_tokens:,} at most in a "
                "prompt. The cache has no such limit. Switch documents off to compare."
            )

        def work(streamer: AnswerStreamer) -> None:
            self._generate(inputs, streamer)

        return self._stream(work)

    def _check_question(self, question: str) -> None:
        if not question.strip():
            raise DocumentError("Please type a question first.")
        length = self._tokenize(question)["input_ids"].shape[1]
        if length > MAX_QUESTION_TOKENS:
            raise DocumentError(f"The question has {length:,} tokens, more than {MAX_QUESTION_TOKENS}. Shorten it.")

    def _generate(self, inputs: dict, streamer: AnswerStreamer, **options) -> Tensor:
        return self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([streamer]),
            **options,
        )

    def _from_cache(self, question: str, documents: Sequence[Document], streamer: AnswerStreamer) -> Tensor | None:
        inputs = self._process(text=[question])
        if not documents:
            self._generate(inputs, streamer)
            return None
        caches = [document.cache for document in documents]
        # nothing is encoded again: one row reads every section of what is switched on
        cache = caches[0].concat(caches)
        projected = self.model.project_context(cache.join([range(len(cache))]))
        sequences = self._generate(inputs, streamer, context_cache=projected)
        if streamer.left.is_set() or sequences.shape[1] * cache.num_tokens > MAX_ATTENTION_PAIRS:
            return None
        length = inputs["input_ids"].shape[1]
        weights = self.model.context_weights(sequences, projected, length, inputs["attention_mask"])[0]
        offset = 0
        for document in documents:
            # attention that looks for nothing rests on the first token of a text: it says nothing about the answer
            weights[[offset + start for start in document.section_starts]] = 0.0
            offset += len(document.spans)
        return weights / weights.sum().clamp(min=1e-9)

    def evidence(self, weights: Tensor, documents: Sequence[Document], num_spans: int = 3) -> list:
        """The spans of the documents that were attended to most: the model's own `find_evidence`."""
        find_evidence = import_module(".evidence", sys.modules[type(self.model).__module__].__package__).find_evidence
        spans = [document.spans for document in documents]
        return find_evidence(weights, spans, [document.text for document in documents], num_spans=num_spans)

    def _stream(self, work: Callable[[AnswerStreamer], Tensor | None]) -> Iterator[Answer]:
        streamer, answer = AnswerStreamer(self.processor.tokenizer), None

        @torch.no_grad()
        def run() -> Tensor | None:
            # waiting for the turns of others is not counted
            streamer.start = perf_counter()
            try:
                return None if streamer.left.is_set() else work(streamer)
            finally:
                streamer.states.put(None)

        done = self._worker.submit(run)
        try:
            while (state := streamer.states.get()) is not None:
                answer = state
                # a busy page shows the newest state, not each of them
                if streamer.states.empty():
                    yield answer
            weights = done.result()
            yield replace(answer, weights=weights, complete=True)
        finally:
            streamer.left.set()


def _last_break(text: str, low: int, high: int) -> int:
    """The best place to cut in `text[low:high]`: behind the last paragraph, line, sentence or word."""
    for mark in BREAKS:
        if (found := text.rfind(mark, low, high)) >= 0:
            return found + len(mark)
    return high
