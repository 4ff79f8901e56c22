"""A model, its stores and its scheduler: questions to events, documents to contexts, for one namespace at a time."""

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from modeling_xcllama.answer_scores import NOT_FOUND, is_found
from modeling_xcllama.context_cache import ContextCache
from modeling_xcllama.evidence import find_evidence
from xcllama.store import ContextStore, Hit, MissingDocumentError
from xcllama.store.manifest import is_snapshot

from .answers import Answer, Piece, Sampling
from .contexts import ResidentContexts, bytes_per_token
from .protocol import ApiError, ChatRequest
from .scheduler import QueueFullError, Row, Scheduler

logger = logging.getLogger(__name__)

LISTED = (
    "SELECT id, SUM(tokens), COUNT(*) FROM documents JOIN passages USING (document) JOIN states USING (state) "
    "WHERE expires > unixepoch() AND {condition} GROUP BY document ORDER BY id LIMIT ?"
)
PASSAGES = "SELECT start, passages.text FROM passages JOIN documents USING (document) WHERE id = ? ORDER BY position"
FAILURES = {
    "timeout": (504, "the answer took longer than this server allows.", "timeout", None, "server_error"),
    "unreadable": (400, "the contexts do not fit into this server's memory.", "context_length_exceeded", "contexts"),
    "stopped": (503, "the server stopped; try again.", "unavailable", None, "server_error"),
}


@dataclass(frozen=True)
class Settings:
    """Bounds of a server, and what it serves.

    Args:
        store: folder of a store, or a snapshot: folder, fsspec URL or Hub id.
        model_name: as clients name it.
        max_rows: answers that are decoded together.
        max_waiting: answers that wait; more are refused with 429.
        max_prompt_tokens, max_new_tokens: of a request.
        max_context_tokens: that one request reads.
        context_bytes: of keys and values that stay in memory.
        max_body_bytes: of a request.
        max_seconds: that a request may take.
        max_uploads: documents that wait to be encoded.
        store_options: of `ContextStore.open`.
    """

    store: str
    model_name: str
    max_rows: int = 16
    max_waiting: int = 64
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 512
    max_context_tokens: int = 32_768
    context_bytes: int = 1 << 30
    max_body_bytes: int = 8 << 20
    max_seconds: float = 120.0
    max_uploads: int = 64
    store_options: dict = field(default_factory=dict)

    @property
    def read_only(self) -> bool:
        """Whether the store is a snapshot, which takes no documents."""
        return is_snapshot(self.store)


@dataclass(frozen=True)
class _Plan:
    """What a question reads, checked against the bounds."""

    prompt: list[int]
    context: bytes | None
    cache: ContextCache | None
    context_tokens: int
    passages: list[tuple[str, int, str]]


class Engine:
    """Answers questions and encodes documents; the scheduler has a thread of its own.

    Args:
        model, processor: in eval mode.
        settings: of the server.

    Raises:
        ValueError: bounds that do not fit the model.
    """

    def __init__(self, model, processor, settings: Settings):
        self.model, self.processor, self.settings = model, processor, settings
        most = settings.context_bytes // bytes_per_token(model)
        if settings.max_context_tokens > most:
            raise ValueError(
                f"{settings.context_bytes:,} bytes hold {most:,} context tokens, a request may read "
                f"{settings.max_context_tokens:,}; raise the bytes or lower the tokens."
            )
        self.resident = ResidentContexts(settings.context_bytes)
        self.scheduler = Scheduler(
            model,
            max_rows=settings.max_rows,
            max_length=settings.max_prompt_tokens + settings.max_new_tokens,
            max_waiting=settings.max_waiting,
            contexts=self.resident,
        )
        ends = model.generation_config.eos_token_id
        self._end_tokens = [ends] if isinstance(ends, int) else list(ends or ())
        self._stores: dict[str, ContextStore] = {}
        self._lock = threading.Lock()
        # one document is encoded at a time: questions share the cores with it
        self._encoder = ThreadPoolExecutor(1, "encoder")
        self._thread = threading.Thread(target=self.scheduler.run, name="scheduler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish what was begun, then close the stores."""
        self.scheduler.close()
        self._thread.join()
        self._encoder.shutdown(cancel_futures=True)
        for store in self._stores.values():
            store.close()

    @property
    def running(self) -> bool:
        """Whether the scheduler runs."""
        return self._thread.is_alive()

    async def alive(self) -> bool:
        """Whether questions can be answered."""
        return self.running

    def store(self, namespace: str) -> ContextStore:
        """The store of a namespace, open.

        Raises:
            ValueError: a snapshot of another namespace, or a store of another model.
        """
        with self._lock:
            if namespace not in self._stores:
                options = self.settings.store_options
                self._stores[namespace] = ContextStore.open(
                    self.settings.store, self.model, self.processor, namespace, **options
                )
            return self._stores[namespace]

    # questions

    async def search(self, namespace: str, question: str, k: int) -> list[Hit]:
        """The passages that fit a question best."""
        if not question.strip():
            raise ApiError(400, "`retrieve` needs words in the question.", code="invalid_value", param="messages")
        return await asyncio.to_thread(lambda: self.store(namespace).search(question, k))

    async def chat(self, namespace: str, chat: ChatRequest, documents: Sequence[str | Hit]) -> AsyncIterator[dict]:
        """Answer from documents: events with what each choice has grown by, and at the end the usage.

        Raises:
            ApiError: a request out of bounds, unknown documents, too much to do, or too late.
        """
        plan = await asyncio.to_thread(self._plan, namespace, chat, documents)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        rows = []
        for choice in range(chat.n):
            answer = Answer(self.processor.tokenizer, self._end_tokens, self._sampling(chat, choice))

            def emit(piece: Piece, choice: int = choice) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, (choice, piece))

            deadline = time.monotonic() + self.settings.max_seconds
            rows.append(Row(plan.prompt, plan.context, plan.cache, answer, emit, deadline, chat.evidence))
        try:
            try:
                self.scheduler.submit(rows)
            except QueueFullError:
                message = "too many questions wait; try again."
                raise ApiError(429, message, code="queue_full", kind="rate_limit_error") from None
            held, left = [""] * chat.n, chat.n
            while left:
                choice, piece = await queue.get()
                if piece.error:
                    raise ApiError(*FAILURES[piece.error])
                left -= piece.finish_reason is not None
                held[choice] += piece.text
                if chat.decline and not piece.finish_reason:
                    continue
                yield self._event(choice, held[choice], piece, chat, plan)
                held[choice] = ""
            new_tokens = sum(len(row.answer.tokens) for row in rows)
            yield {"usage": usage(len(plan.prompt), plan.context_tokens, new_tokens)}
        finally:
            for row in rows:
                row.cancelled = True

    def _sampling(self, chat: ChatRequest, choice: int) -> Sampling:
        most = self.settings.max_new_tokens
        return Sampling(
            min(chat.max_tokens or chat.max_completion_tokens or most, most),
            chat.temperature,
            chat.top_p,
            None if chat.seed is None else (chat.seed + choice) % 2**63,
            chat.stops,
            (chat.top_logprobs or 0) if chat.logprobs else None,
        )

    def _event(self, choice: int, text: str, piece: Piece, chat: ChatRequest, plan: _Plan) -> dict:
        event = {"index": choice, "text": text, "logprobs": piece.logprobs, "finish_reason": piece.finish_reason}
        if piece.finish_reason is None:
            return event
        threshold = self.model.config.answer_threshold
        event["score"] = piece.score
        if plan.context is not None and threshold is not None:
            event["found"] = is_found(piece.score, threshold)
            if chat.decline and not event["found"]:
                event["text"] = NOT_FOUND
        if chat.evidence:
            event["evidence"] = [] if piece.weights is None else self._evidence(piece.weights, plan.passages)
        return event

    def _plan(self, namespace: str, chat: ChatRequest, documents: Sequence[str | Hit]) -> _Plan:
        if chat.decline and self.model.config.answer_threshold is None:
            raise _refused("this model has no `answer_threshold`: leave out `decline`.", "decline")
        if chat.evidence and not self.processor.context_tokenizer.is_fast:
            raise _refused("this model cannot say `evidence`: leave it out.", "evidence")
        prompt = self._prompt(chat)
        if not documents:
            return _Plan(prompt, None, None, 0, [])
        store = self.store(namespace)
        if not self.model.config.cross_attention_rope:
            # documents have no order: those of another one are read where these lie
            documents = sorted(
                documents, key=lambda one: (one, -1) if isinstance(one, str) else (one.id, one.position)
            )
        try:
            # before the states: what is replaced meanwhile shows in the counts of tokens
            passages = [own for one in documents for own in passages_of(store, one)] if chat.evidence else []
            cache = store.get(documents)
        except MissingDocumentError as error:
            names = ", ".join(map(repr, error.ids[:8]))
            raise ApiError(404, f"no context {names}.", code="context_not_found", param="contexts") from None
        cache = cache.join([range(len(cache))])
        (tokens,) = cache.lengths
        if tokens > self.settings.max_context_tokens:
            most = self.settings.max_context_tokens
            message = f"the contexts have {tokens} tokens, at most {most} are read at once."
            raise _refused(message, "contexts", "context_length_exceeded")
        return _Plan(prompt, content_name(namespace, cache) if tokens else None, cache, tokens, passages)

    def _prompt(self, chat: ChatRequest) -> list[int]:
        settings = self.settings
        most = chat.max_tokens or chat.max_completion_tokens or 0
        if most > settings.max_new_tokens:
            raise _refused(f"`max_tokens` must be at most {settings.max_new_tokens}, got {most}.", "max_tokens")
        system, history, question = chat.turns()
        if system is not None and not self.processor.tokenizer.chat_template:
            raise _refused("this model takes no system message: leave it out.", "messages")
        (prompt,) = self.processor(text=[question], history=[history], system=system)["input_ids"]
        if len(prompt) > settings.max_prompt_tokens:
            message = f"the messages have {len(prompt)} tokens, at most {settings.max_prompt_tokens} are taken."
            raise _refused(message, "messages", "context_length_exceeded")
        return prompt

    def _evidence(self, weights, passages: list[tuple[str, int, str]]) -> list[dict]:
        texts = [text for _, _, text in passages]
        mappings = [
            self.processor(contexts=[text], return_offsets_mapping=True)["context_offset_mapping"][0] for text in texts
        ]
        spans = find_evidence(weights, mappings, texts)
        return [
            {
                "document": passages[span.document][0],
                "start": passages[span.document][1] + span.start,
                "end": passages[span.document][1] + span.end,
                "text": span.text,
                "weight": span.weight,
            }
            for span in spans
        ]

    # documents

    async def add(self, namespace: str, name: str, text: str, metadata: dict, ttl: float | None) -> None:
        """Encode a document; on return it is in the store.

        Raises:
            ApiError: 400, it is too long or cannot be encoded.
        """
        await asyncio.get_running_loop().run_in_executor(
            self._encoder, self._add, namespace, name, text, metadata, ttl
        )

    def _add(self, namespace: str, name: str, text: str, metadata: dict, ttl: float | None) -> None:
        limit = self.settings.max_context_tokens
        ids = self.processor.context_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > limit:
            message = f"the text has {len(ids)} tokens, at most {limit} are read at once: split it."
            raise ApiError(400, message, code="context_length_exceeded", param="text")
        try:
            self.store(namespace).add(name, text, metadata, ttl=ttl, progress=False)
        except (ValueError, OSError) as error:
            # its text may name paths
            logger.warning(f"a document was not encoded: {error}")
            raise ApiError(400, "this document could not be encoded.", code="not_encoded", param="text") from error

    async def contexts(self, namespace: str, name: str | None = None, after: str = "", limit: int = 1) -> list[dict]:
        """The context `name`, or those whose ids come after `after`: id, tokens, passages."""
        condition, value = ("id > ?", after) if name is None else ("id = ?", name)
        query = LISTED.format(condition=condition)
        rows = await asyncio.to_thread(lambda: self.store(namespace).catalogue.rows(query, (value, limit)))
        return [dict(zip(("id", "tokens", "passages"), row, strict=True)) for row in rows]

    async def delete(self, namespace: str, name: str) -> bool:
        """Remove a context; returns whether it was there.

        Raises:
            ApiError: 409, it is pinned.
        """
        try:
            await asyncio.to_thread(lambda: self.store(namespace).evict(name))
        except MissingDocumentError:
            return False
        except ValueError as error:
            raise ApiError(409, "this context is pinned.", code="context_pinned") from error
        return True

    async def stats(self) -> dict[str, int]:
        """What is going on now, of all namespaces together."""
        return {
            "rows": self.scheduler.running,
            "waiting_rows": self.scheduler.waiting,
            "resident_contexts": len(self.resident),
            "resident_context_tokens": self.resident.tokens,
            "context_evictions": self.resident.evictions,
            "steps": self.scheduler.steps,
        }


def _refused(message: str, param: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code, param)


def usage(prompt_tokens: int, context_tokens: int, new_tokens: int) -> dict:
    """Tokens of a request: those of contexts are prompt tokens that were read from a cache."""
    return {
        "prompt_tokens": prompt_tokens + context_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + context_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": context_tokens},
    }


def content_name(namespace: str, cache: ContextCache) -> bytes:
    """Names what one row reads by its content: a document that was replaced has another name."""
    digest = hashlib.blake2b(namespace.encode("utf-8", "surrogatepass") + b"\0", digest_size=16)
    digest.update(repr([cache.offsets[one + 1] - cache.offsets[one] for one in cache.rows[0]]).encode())
    digest.update(cache.row_token_ids(0).numpy().tobytes())
    return digest.digest()


def passages_of(store: ContextStore, document: str | Hit) -> list[tuple[str, int, str]]:
    """Id, start and text of the passages of a document, in the order in which a row reads them."""
    if isinstance(document, Hit):
        return [(document.id, document.start, document.text)]
    rows = store.catalogue.rows(PASSAGES, (document,))
    return [(document, start, text) for start, text in rows]
