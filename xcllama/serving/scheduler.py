"""Continuous batching over contexts: rows join and leave at every step, whatever contexts they read.

`@serve.batch` cannot do this: its batches begin and end together, so that a short answer waits for the longest one and
a question for the batch before it. Here a step decodes one token of every running row with one call of
`model.forward`; rows that read one context read its keys and values once.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from modeling_xcllama.context_cache import ContextCache

from .answers import Answer, Piece
from .contexts import ResidentContexts

# prompts that enter between two steps of the running rows, in tokens
PREFILL_TOKENS = 512


class QueueFullError(Exception):
    """More rows would wait than may."""


@dataclass(eq=False)
class Row:
    """One answer to write.

    Args:
        prompt: token ids.
        context: names what `cache` holds; None: no context.
        cache: of one row, projected where it is not resident.
        answer: takes the logits.
        emit: is called with every `Piece`, in the scheduler's thread.
        deadline: of `time.monotonic`.
        output_weights: attend once more at the end, to say what the answer was taken from.
        cancelled: nobody waits for it any more; it is left out of the next step.
    """

    prompt: list[int]
    context: Hashable | None
    cache: ContextCache | None
    answer: Answer
    emit: Callable[[Piece], object]
    deadline: float
    output_weights: bool = False
    cancelled: bool = False

    def send(self, piece: Piece) -> None:
        """Hand a piece to who waits for it."""
        if not self.cancelled:
            self.emit(piece)


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, a slot a row: `[max_rows, kv_heads, max_length, head_dim]`."""

    is_sliding = False

    def __init__(self, slots: "_Slots", shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self._slots, self.is_initialized = slots, True
        # masked values are multiplied by zero: they have to be finite
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: slots are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write one token of every row behind its own."""
        rows, places = self._slots.rows, self._slots.places
        self.keys[rows, :, places] = key_states[:, :, 0]
        self.values[rows, :, places] = value_states[:, :, 0]
        longest = self._slots.longest
        return self.keys[: len(rows), :, :longest], self.values[: len(rows), :, :longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a step sees, and the first of them."""
        return self._slots.longest, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row before this step."""
        return self._slots.longest - 1

    def get_max_length(self) -> int:
        """Tokens of a slot."""
        return self.keys.shape[2]


class _Slots(Cache):
    """The decoder's own keys and values of all running rows; the rows fill the first slots."""

    def __init__(self, model, max_rows: int, max_length: int):
        config, weight = model.config, model.model.embed_tokens.weight
        shape = (max_rows, config.num_key_value_heads, max_length, config.head_dim)
        layers = [_SlotLayer(self, shape, weight.dtype, weight.device) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=layers)
        self.lengths: list[int] = []

    def step(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Make room for one token of every row; its positions `[rows, 1]` and what it sees `[rows, longest]`."""
        self.longest = max(self.lengths) + 1
        self.rows = torch.arange(len(self.lengths), device=device)
        self.places = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        return self.places[:, None], torch.arange(self.longest, device=device) <= self.places[:, None]

    def enter(self, prefilled: DynamicCache) -> None:
        """Copy the keys and values of a prompt into the next slot."""
        slot, length = len(self.lengths), prefilled.get_seq_length()
        for own, new in zip(self.layers, prefilled.layers, strict=True):
            own.keys[slot, :, :length], own.values[slot, :, :length] = new.keys[0], new.values[0]
        self.lengths.append(length)

    def leave(self, slot: int) -> None:
        """Free a slot; the last row moves into it."""
        length = self.lengths.pop()
        if slot < len(self.lengths):
            for own in self.layers:
                own.keys[slot, :, :length] = own.keys[len(self.lengths), :, :length]
                own.values[slot, :, :length] = own.values[len(self.lengths), :, :length]
            self.lengths[slot] = length


class Scheduler:
    """The rows of one model.

    Args:
        model: in eval mode.
        max_rows: decoded together.
        max_length: tokens of a prompt and its answer.
        max_waiting: rows that wait beside them.
        contexts: the resident ones.

    Raises:
        ValueError: a sliding window that `max_length` exceeds.
    """

    def __init__(self, model, *, max_rows: int, max_length: int, max_waiting: int, contexts: ResidentContexts):
        window = model.config.sliding_window
        if window is not None and max_length > window:
            raise ValueError(f"prompt and answer must fit into the sliding window of {window}, got {max_length}.")
        self.model, self.contexts, self.max_rows, self.max_waiting = model, contexts, max_rows, max_waiting
        self.steps = 0
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._slots = _Slots(model, max_rows, max_length)
        self._changed, self._closing, self.alive = threading.Condition(), False, True

    @property
    def running(self) -> int:
        """Rows that are decoded now."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    def submit(self, rows: Sequence[Row]) -> None:
        """Let rows wait for their turn, all or none.

        Raises:
            QueueFullError: too many wait, or the scheduler is being closed.
        """
        with self._changed:
            taken = len(self._waiting) + len(self._running) + len(rows)
            if self._closing or not self.alive or taken > self.max_rows + self.max_waiting:
                raise QueueFullError
            self._waiting.extend(rows)
            self._changed.notify()

    def run(self) -> None:
        """Step until `close`; what still waits when it ends otherwise is told so."""
        try:
            while True:
                with self._changed:
                    while not (self._waiting or self._running or self._closing):
                        self._changed.wait()
                    if self._closing and not (self._waiting or self._running):
                        return
                self.step()
        finally:
            with self._changed:
                self.alive = False
                left = [*self._running, *self._waiting]
                self._waiting.clear()
            for row in left:
                row.send(Piece(error="stopped"))

    def close(self) -> None:
        """Take no more rows; `run` ends when the others are done."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    @torch.inference_mode()
    def step(self) -> None:
        """Rows that nobody waits for leave, others enter, and every row gets a token."""
        self._drop()
        self._enter()
        running = list(self._running)
        if running:
            tokens = torch.tensor([[row.answer.tokens[-1]] for row in running], device=self.model.device)
            positions, mask = self._slots.step(self.model.device)
            logits = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._slots,
                use_cache=True,
                context_cache=self.contexts.rows([row.context for row in running]),
            ).logits[:, -1]
            for row, scores in zip(running, logits, strict=True):
                if self._grow(row, scores):
                    self._leave(row)
            self.steps += 1

    def _drop(self) -> None:
        now = time.monotonic()
        for row in [row for row in self._running if row.cancelled or row.deadline < now]:
            self._leave(row)
            row.send(Piece(error="timeout"))
        with self._changed:
            late = [row for row in self._waiting if row.cancelled or row.deadline < now]
            for row in late:
                self._waiting.remove(row)
        for row in late:
            row.send(Piece(error="timeout"))

    def _enter(self) -> None:
        """Prefill waiting rows, first come first served, as far as there is room."""
        tokens = 0
        while self._waiting and len(self._running) < self.max_rows and tokens < PREFILL_TOKENS:
            row = self._waiting[0]
            try:
                if not self._has_context(row):
                    break
            except ValueError:
                self._waiting.popleft()
                row.send(Piece(error="unreadable"))
                continue
            tokens += len(row.prompt)
            self._prefill(row)
            self._waiting.popleft()

    def _has_context(self, row: Row) -> bool:
        """Make the context of a row resident; False: there is no room now."""
        if row.context is None or row.context in self.contexts:
            return True
        (tokens,) = row.cache.lengths
        return self.contexts.add(row.context, tokens, lambda: self.model.project_context(row.cache))

    def _prefill(self, row: Row) -> None:
        own = DynamicCache(config=self.model.config)
        if row.context is not None:
            self.contexts.take(row.context)
        logits = self.model(
            input_ids=torch.tensor([row.prompt], device=self.model.device),
            past_key_values=own,
            use_cache=True,
            logits_to_keep=1,
            context_cache=self.contexts.rows([row.context]),
        ).logits[0, -1]
        if self._grow(row, logits):
            if row.context is not None:
                self.contexts.release(row.context)
            return
        self._slots.enter(own)
        self._running.append(row)

    def _leave(self, row: Row) -> None:
        slot = self._running.index(row)
        self._slots.leave(slot)
        last = self._running.pop()
        if last is not row:
            self._running[slot] = last
        if row.context is not None:
            self.contexts.release(row.context)

    def _grow(self, row: Row, logits: Tensor) -> bool:
        """Add a token to a row; returns whether that was its last."""
        piece = row.answer.add(logits)
        if piece.finish_reason and row.output_weights and row.context is not None:
            sequence = torch.tensor([row.prompt + row.answer.tokens], device=self.model.device)
            context = self.contexts.rows([row.context])
            piece.weights = self.model.context_weights(sequence, context, len(row.prompt))[0].cpu()
        row.send(piece)
        return piece.finish_reason is not None
