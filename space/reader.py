"""The model as the Space uses it: encodes texts by passages, answers from the surest, streams what a prompt gives."""

import copy
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from time import perf_counter

import torch
from documents import DocumentError
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from visitors import Document

# tokens that are encoded in one turn, about
TURN_TOKENS = 1024
MAX_QUESTION_TOKENS = 256
MAX_QUESTION_LETTERS = 2000
SENTENCE_ENDS = (". ", "! ", "? ", ".\n", "\n")


@dataclass(frozen=True)
class Read:
    """A passage that was read, and its own answer.

    Args:
        document: that it is from.
        start, end: its characters there.
        answer, score, found: of this passage alone.
    """

    document: Document
    start: int
    end: int
    answer: str
    score: float
    found: bool


@dataclass(frozen=True)
class Answer:
    """An answer as far as it is written.

    Args:
        text: so far; of answers from the cache when they are complete.
        num_tokens: tokens written.
        first_token_seconds: from the start of the work, not of the wait for it, to the first token.
        seconds: from the start to the last token.
        complete: the last state.
        found: False: the documents hold no answer that is sure enough.
        score: of the answer, 0 to 1; None for answers from the prompt.
        reads: the passages that were read, the one of the answer first.
        sentence: (start, end) of the sentence of the answer in the document of the first passage.
    """

    text: str
    num_tokens: int
    first_token_seconds: float
    seconds: float
    complete: bool = False
    found: bool = True
    score: float | None = None
    reads: list[Read] = field(default_factory=list)
    sentence: tuple[int, int] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Rate after the first token; 0 where there is only one."""
        return (self.num_tokens - 1) / (self.seconds - self.first_token_seconds) if self.num_tokens > 1 else 0.0


class AnswerStreamer(BaseStreamer, StoppingCriteria):
    """Puts the state of an answer into a queue after every token, and ends it when nobody waits for it any more.

    Args:
        decode: ids to text.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self.states: queue.Queue[Answer | None] = queue.Queue()
        self.left = threading.Event()
        self._decode, self._ids, self._prompt_seen = decode, [], False
        self.start, self._first, self._steps = perf_counter(), 0.0, 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if self._prompt_seen:
            self._ids += value.reshape(-1).tolist()
        self._prompt_seen = True

    def end(self) -> None:
        """The last state is on its way already."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        """After every step: note the time, and say whether the answer is to end."""
        now = perf_counter() - self.start
        self._first, self._steps = self._first or now, self._steps + 1
        # half of a character that takes several tokens is not shown
        text = self._decode(self._ids).rstrip("\ufffd").strip()
        self.states.put(Answer(text, self._steps, self._first, now))
        return torch.full((input_ids.shape[0],), self.left.is_set(), device=input_ids.device)


class Reader:
    """A model and its processor behind one thread, which takes passages and answers in the order they come.

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
        pipelines, self._passages = self._code("pipeline_xcllama"), self._code("passages")
        # a tokenizer must not be set up for two texts at once: the thread of the model has its own
        self._tokenizing, self._own = threading.Lock(), copy.deepcopy(processor)
        self._answering = pipelines.ContextQuestionAnsweringPipeline(model=model, processor=self._own)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        # tokens and seconds of all that was encoded
        self._encoded, self._encoding_seconds = 0, 0.0
        self.bytes_per_token = self._bytes_per_token()

    def _code(self, name: str):
        """A module of the model's own code, which came with it."""
        return import_module(f".{name}", sys.modules[type(self.model).__module__].__package__)

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

    def _length(self, text: str) -> int:
        with self._tokenizing:
            tokenizer = self.processor.context_tokenizer
            return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def count_tokens(self, text: str, name: str) -> int:
        """Tokens of a text.

        Raises:
            DocumentError: more than a document may have.
        """
        # no tokenizer makes tokens of more than some dozen letters on average
        count = len(text) if len(text) > 32 * self.max_document_tokens else self._length(text)
        if count > self.max_document_tokens:
            raise DocumentError(
                f"“{name}” is too long: {len(text):,} letters. A document may have "
                f"{self.max_document_tokens:,} tokens, about {4 * self.max_document_tokens:,} letters: add parts."
            )
        return count

    def encode(
        self, name: str, text: str, report: Callable[[float, float | None], None] = lambda share, seconds: None
    ) -> Document:
        """Encode a text, some passages at a time, so that others get their turn in between.

        Args:
            name: of the document.
            text: to encode.
            report: gets the share that is done, 0 to 1, and the seconds left, as far as they can be told.
        """
        passages = self._passages.split_passages(text, self._length)
        lengths = [self._length(text[start:stop]) for start, stop in passages]
        caches, seconds, done = [], 0.0, 0
        for turn in _turns(lengths):
            rate = self._encoded / self._encoding_seconds if self._encoded else None
            report(done / max(sum(lengths), 1), rate and (sum(lengths) - done) / rate)
            inputs = self._process(contexts=[text[slice(*passages[place])] for place in turn])
            cache, taken = self._worker.submit(self._encode, inputs).result()
            caches.append(cache)
            seconds, done = seconds + taken, done + sum(lengths[place] for place in turn)
        report(1.0, 0.0)
        return Document(name, text, caches[0].concat(caches), tuple(passages), seconds)

    def _encode(self, inputs: dict) -> tuple:
        start = perf_counter()
        cache = self.model.encode_context(**inputs)
        seconds = perf_counter() - start
        self._encoded, self._encoding_seconds = self._encoded + cache.num_tokens, self._encoding_seconds + seconds
        return cache, seconds

    def answer_from_cache(self, question: str, documents: Sequence[Document]) -> Iterator[Answer]:
        """The states of an answer that is read from the caches of `documents`; the last one has text and places.

        Raises:
            DocumentError: no document, or a question that cannot be taken.
        """
        self._check_question(question)
        if not documents:
            raise DocumentError("No document is switched on: add one, or switch one on.")
        return self._stream(lambda streamer: self._from_cache(question, documents, streamer))

    def answer_from_prompt(self, question: str, documents: Sequence[Document]) -> Iterator[Answer]:
        """The states of an answer of the decoder alone, the texts of `documents` in its prompt.

        Raises:
            DocumentError: texts that are too long for a prompt.
        """
        self._check_question(question)
        text = "\n\n".join(document.text for document in documents)
        prompt = self.processor.prompts([f"{text}\n\n{question}" if text else question])[0]
        with self._tokenizing:
            inputs = self.processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        length = inputs["input_ids"].shape[1]
        if length > self.max_prompt_tokens:
            raise DocumentError(
                f"The prompt would have {length:,} tokens; this Space reads {self.max_prompt_tokens:,} at most in a "
                "prompt. The cache has no such limit. Switch documents off to compare."
            )
        return self._stream(lambda streamer: self._from_prompt(inputs, streamer))

    def _check_question(self, question: str) -> None:
        if not (question or "").strip():
            raise DocumentError("Please type a question first.")
        if len(question) > MAX_QUESTION_LETTERS:
            raise DocumentError(f"A question may have {MAX_QUESTION_LETTERS:,} letters. Shorten it.")
        length = self._length(question)
        if length > MAX_QUESTION_TOKENS:
            raise DocumentError(f"The question has {length:,} tokens, more than {MAX_QUESTION_TOKENS}. Shorten it.")

    def _from_prompt(self, inputs: dict, streamer: AnswerStreamer) -> dict:
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "streamer": streamer}
        stopping = StoppingCriteriaList([streamer])
        ids = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            stopping_criteria=stopping,
            **options,
        )
        written = ids[0, inputs["input_ids"].shape[1] :]
        return {"text": self._whole(self._own.decode(written, skip_special_tokens=True).strip())}

    def _from_cache(self, question: str, documents: Sequence[Document], streamer: AnswerStreamer) -> dict:
        # nothing is encoded again: the passages of what is switched on are the documents of one row
        caches = [document.cache for document in documents]
        cache = caches[0].concat(caches)
        places = [(document, *span) for document in documents for span in document.passages]
        texts = [document.text[start:stop] for document, start, stop in places]
        options = {"max_new_tokens": self.max_new_tokens, "stopping_criteria": StoppingCriteriaList([streamer])}
        (answer,) = self._answering(question, [texts], cache.join([range(len(cache))]), **options)["answers"]
        reads = [
            Read(*places[one["document"]], one["answer"], one["score"], one["found"]) for one in answer["passages"]
        ]
        document, first, last = places[answer["document"]]
        reads.sort(key=lambda read: (read.document is not document, read.start != first))
        sentence = (first + answer["start"], first + answer["end"])
        fields = {"found": answer["found"], "score": answer["score"], "reads": reads, "sentence": sentence}
        return {"text": self._whole(answer["answer"])} | fields

    def _whole(self, text: str) -> str:
        """An answer that ran out of tokens, without the sentence, or the word, in whose middle it ends."""
        if len(self._own.tokenizer(text, add_special_tokens=False)["input_ids"]) < self.max_new_tokens - 1:
            return text
        end = max(text.rfind(mark) for mark in SENTENCE_ENDS)
        if end > 0:
            return text[: end + 1].rstrip()
        return (text.rpartition(" ")[0] or text) + " …"

    def _stream(self, work: Callable[[AnswerStreamer], dict]) -> Iterator[Answer]:
        streamer = AnswerStreamer(partial(self._own.decode, skip_special_tokens=True))
        answer = Answer("", 0, 0.0, 0.0)

        @torch.no_grad()
        def run() -> dict:
            # waiting for the turns of others is not counted
            streamer.start = perf_counter()
            try:
                return {} if streamer.left.is_set() else work(streamer)
            finally:
                streamer.states.put(None)

        done = self._worker.submit(run)
        try:
            while (state := streamer.states.get()) is not None:
                answer = state
                # a busy page shows the newest state, not each of them
                if streamer.states.empty():
                    yield answer
            yield replace(answer, **done.result(), complete=True)
        finally:
            streamer.left.set()


def _turns(lengths: Sequence[int]) -> Iterator[range]:
    """Neighbouring passages of about `TURN_TOKENS` tokens together."""
    start = total = 0
    for place, length in enumerate(lengths):
        if place > start and total + length > TURN_TOKENS:
            yield range(start, place)
            start = place
            total = 0
        total += length
    yield range(start, len(lengths))
