"""ContextCache: encoded documents as packed, immutable tensors that are saved, verified, quantized and combined."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from operator import gt, index
from pathlib import Path

import torch
from torch import Tensor

from .context_file import (
    FLOAT_DTYPES,
    FORMAT,
    FORMAT_VERSION,
    LAYOUTS,
    QUANTIZED_BITS,
    assemble,
    read_file,
    write_file,
)
from .indices import as_indices
from .memory_report import MemoryReport, memory_report
from .quantized_tensor import QuantizedTensor, cat_states, check_finite, map_state, quantization_heads, quantize


@dataclass(frozen=True, eq=False)
class ContextCache:
    """Encoded documents, packed back to back, and the rows (one a request) that read them.

    Args:
        states: by name, `{"hidden": [num_tokens, width]}` or `{"key", "value": [num_tokens, kv_heads, head_dim]}`;
            tensors or `QuantizedTensor`s.
        offsets: first token of each document and the end of the last, `num_documents + 1` values.
        token_ids: int32 `[num_tokens]`, on the CPU.
        fingerprint: digest of what made the states.
        rows: the documents that each row reads, in order; default one row a document.

    Raises:
        ValueError: the parts do not fit together.
    """

    states: dict[str, "Tensor | QuantizedTensor"]
    offsets: tuple[int, ...]
    token_ids: Tensor
    fingerprint: str
    rows: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self):
        # `index` takes integers of any library, and nothing that would have to be rounded
        object.__setattr__(self, "offsets", tuple(map(index, self.offsets)))
        documents = range(len(self.offsets) - 1)
        if self.rows is None:
            object.__setattr__(self, "rows", tuple(zip(documents, strict=True)))
        else:
            object.__setattr__(self, "rows", tuple(tuple(map(index, row)) for row in self.rows))
            if not all(map(documents.__contains__, chain.from_iterable(self.rows))):
                raise ValueError(f"`rows` must name documents in [0, {len(self.offsets) - 2}].")
        if tuple(self.states) not in LAYOUTS.values():
            raise ValueError(f"a context cache holds 'hidden' or 'key' and 'value' states, got {sorted(self.states)}.")
        if not self.rows:
            raise ValueError("a context cache needs at least one context, got an empty list.")
        if self.offsets[:1] != (0,) or any(map(gt, self.offsets, self.offsets[1:])):
            raise ValueError(f"`offsets` must start at 0 and never decrease, got {self.offsets[:8]}...")
        self._check_tensors()
        for name, tensor in (*self.states.items(), ("token_ids", self.token_ids)):
            if tensor.shape[0] != self.offsets[-1]:
                raise ValueError(
                    f"`{name}` must have {self.offsets[-1]} tokens as `offsets` say, got {tensor.shape[0]}."
                )

    def _check_tensors(self) -> None:
        """Refuse what could be saved and not loaded, or served and not read."""
        if not isinstance(self.fingerprint, str):
            raise ValueError(f"`fingerprint` must be a string, got {self.fingerprint!r:.80}.")
        if self.token_ids.dtype not in (torch.int32, torch.int64) or self.token_ids.dim() != 1:
            raise ValueError(f"`token_ids` must be a list of integers, got {self.token_ids.dtype}.")
        if len({(type(state), state.shape, self._kind(state)) for state in self.states.values()}) > 1:
            raise ValueError("`key` and `value` must have one shape and one dtype.")
        for name, state in self.states.items():
            if not isinstance(state, Tensor):
                state.check(name)
            elif state.dtype not in FLOAT_DTYPES.values():
                raise ValueError(
                    f"`{name}` must be one of {', '.join(FLOAT_DTYPES)}, or quantized, got {state.dtype}; use `.to`."
                )
            elif state.dim() != (2 if name == "hidden" else 3):
                raise ValueError(f"`{name}` must have {2 if name == 'hidden' else 3} dimensions, got {state.dim()}.")
            else:
                check_finite(name, state)

    @staticmethod
    def _kind(state: "Tensor | QuantizedTensor") -> torch.dtype:
        if isinstance(state, Tensor):
            return state.dtype
        return torch.int8 if state.bits == 8 else torch.int4

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __repr__(self) -> str:
        return (
            f"ContextCache({len(self)} contexts, {sum(self.lengths)} tokens, {self.layout}, {self.dtype}, "
            f"{self.nbytes} bytes, fingerprint {self.fingerprint[:12]})"
        )

    def __deepcopy__(self, memo) -> "ContextCache":
        # immutable: copies share it (assisted decoding deep-copies its arguments)
        return self

    @property
    def layout(self) -> str:
        """ "hidden" (states, projected at use) or "condensed" (final keys and values)."""
        return "hidden" if "hidden" in self.states else "condensed"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored states; `torch.int8` or `torch.int4` when quantized."""
        return self._kind(next(iter(self.states.values())))

    @property
    def is_quantized(self) -> bool:
        """Whether the states are int8 or int4."""
        return not isinstance(next(iter(self.states.values())), Tensor)

    @property
    def device(self) -> torch.device:
        """Device of the states."""
        return next(iter(self.states.values())).device

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row reads."""
        return [sum(self.offsets[d + 1] - self.offsets[d] for d in row) for row in self.rows]

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents that the rows read, each document counted once."""
        return sum(self.offsets[d + 1] - self.offsets[d] for d in {d for row in self.rows for d in row})

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token's states, scales included."""
        stored = sum(state.nbytes for state in self.states.values())
        return stored / self.offsets[-1] if self.offsets[-1] else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the states that the rows read, scales included, each document counted once."""
        return round(self.bytes_per_token * self.num_tokens)

    def memory_report(self) -> MemoryReport:
        """File, mapped and state bytes of what the rows read; printable."""
        return memory_report(self)

    def row_token_ids(self, row: int) -> Tensor:
        """Token ids of what row `row` reads, int32 `[length]`."""
        (row,) = as_indices([row], len(self), "row")
        parts = [self.token_ids[self.offsets[d] : self.offsets[d + 1]] for d in self.rows[row]]
        return torch.cat(parts) if parts else self.token_ids[:0]

    def _with_rows(self, rows: tuple[tuple[int, ...], ...]) -> "ContextCache":
        """The same documents read by other rows, which are known to be right: nothing is checked again."""
        if not rows:
            raise ValueError("a context cache needs at least one context, got an empty list.")
        cache = copy.copy(self)
        object.__setattr__(cache, "rows", rows)
        return cache

    def select(self, indices: "Iterable[int] | Iterable[bool] | Tensor") -> "ContextCache":
        """One row for each of `indices`, in that order, or for each row that a mask is true for; nothing is copied.

        Raises:
            TypeError: something that is no integer.
            ValueError: an index out of range, a mask of another length, or no row.
        """
        return self._with_rows(tuple(self.rows[i] for i in as_indices(indices, len(self))))

    def join(self, groups: "Iterable[Iterable[int] | Iterable[bool] | Tensor]") -> "ContextCache":
        """One row for each group, reading all its contexts; an empty group is a row without a context.

        Raises:
            TypeError, ValueError: as in `select`, of any group.
        """
        rows = []
        for group in groups:
            rows.append(
                tuple(chain.from_iterable(self.rows[index] for index in as_indices(group, len(self), "groups")))
            )
        return self._with_rows(tuple(rows))

    @staticmethod
    def concat(caches: Sequence["ContextCache"]) -> "ContextCache":
        """The rows of all `caches`, one after the other.

        Raises:
            ValueError: no cache, or caches of different layout, dtype or fingerprint.
        """
        if not caches:
            raise ValueError("`ContextCache.concat` needs at least one cache, got an empty list.")
        first = caches[0]
        for cache in caches[1:]:
            for field in ("layout", "dtype", "fingerprint", "device"):
                if getattr(cache, field) != getattr(first, field):
                    raise ValueError(
                        f"caches to concatenate must have one {field}, "
                        f"got {getattr(first, field)} and {getattr(cache, field)}."
                    )
        if all(cache.states is first.states for cache in caches):
            return first._with_rows(tuple(chain.from_iterable(cache.rows for cache in caches)))
        offsets, rows = [0], []
        for cache in caches:
            start, documents = offsets[-1], len(offsets) - 1
            offsets.extend(start + offset for offset in cache.offsets[1:])
            rows.extend(tuple(document + documents for document in row) for row in cache.rows)
        states = {name: cat_states([cache.states[name] for cache in caches]) for name in first.states}
        token_ids = torch.cat([cache.token_ids for cache in caches])
        return ContextCache(states, tuple(offsets), token_ids, first.fingerprint, tuple(rows))

    def quantize(self, dtype: str) -> "ContextCache":
        """A new cache with int8 (scale a token and head) or int4 (asymmetric groups) states, outliers kept in 16 bit.

        Raises:
            ValueError: `dtype` is neither "int8" nor "int4", or the cache is quantized already.
        """
        if dtype not in QUANTIZED_BITS:
            raise ValueError(f"`dtype` must be one of {', '.join(map(repr, QUANTIZED_BITS))}, got {dtype!r}.")
        if self.is_quantized:
            raise ValueError(f"this cache is {self.dtype} already; quantize the 16-bit cache it came from.")

        def convert(state: Tensor) -> QuantizedTensor:
            heads = state if state.dim() == 3 else state.unflatten(1, (quantization_heads(state.shape[1]), -1))
            return quantize(heads, QUANTIZED_BITS[dtype])

        return replace(self, states={name: convert(state) for name, state in self.states.items()})

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> "ContextCache":
        """The cache on `device` and, when not quantized, in the floating `dtype`.

        Raises:
            ValueError: another dtype of a quantized cache, or one that cannot hold the states.
        """
        if dtype is not None and (self.is_quantized or dtype not in FLOAT_DTYPES.values()):
            raise ValueError(
                f"a {self.dtype} cache cannot be converted to {dtype}; use `quantize`, or keep its dtype."
            )
        if dtype in (None, self.dtype) and device in (None, self.device, str(self.device)):
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype, non_blocking=non_blocking)

        states = {name: map_state(state, move) for name, state in self.states.items()}
        if dtype not in (None, self.dtype):
            return replace(self, states=states)
        # the same values elsewhere: looking at them would wait for the device
        cache = copy.copy(self)
        object.__setattr__(cache, "states", states)
        return cache

    def compact(self) -> "ContextCache":
        """A cache that stores only the documents its rows read; itself if that is all of them."""
        used = sorted({document for row in self.rows for document in row})
        if used == list(range(len(self.offsets) - 1)):
            return self
        spans = [(self.offsets[document], self.offsets[document + 1]) for document in used]
        renumbered = {document: position for position, document in enumerate(used)}

        def gather(tensor):
            return map_state(tensor, lambda part: torch.cat([part[:0], *(part[start:end] for start, end in spans)]))

        return ContextCache(
            {name: gather(state) for name, state in self.states.items()},
            tuple(accumulate((end - start for start, end in spans), initial=0)),
            gather(self.token_ids),
            self.fingerprint,
            tuple(tuple(renumbered[document] for document in row) for row in self.rows),
        )

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file, atomically: readers see the old file or the new one."""
        cache = self.compact().to("cpu")
        tensors = {
            "token_ids": cache.token_ids.contiguous(),
            "offsets": torch.tensor(cache.offsets, dtype=torch.int64),
        }
        for name, state in cache.states.items():
            parts = (state,) if isinstance(state, Tensor) else state.tensors()
            tensors |= {
                name + suffix: part.contiguous() for suffix, part in zip(("", ".scale", ".zero"), parts, strict=False)
            }
        flat = [document for row in cache.rows for document in row]
        tensors["rows"] = torch.tensor(flat, dtype=torch.int64)
        tensors["row_offsets"] = torch.tensor([0, *accumulate(map(len, cache.rows))], dtype=torch.int64)
        header = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "layout": cache.layout,
            "dtype": str(cache.dtype).removeprefix("torch."),
            "fingerprint": cache.fingerprint,
        }
        write_file(Path(path), header, tensors)

    @classmethod
    def load(cls, path: str | Path, verify: bool = True) -> "ContextCache":
        """Map a file that `save` wrote.

        Args:
            path: the file.
            verify: compare the checksum, which reads the whole file once.

        Raises:
            ValueError: no context cache, of a newer format, truncated or altered.
            FileNotFoundError: no such file.
        """
        header, tensors = read_file(Path(path), verify)
        try:
            states, offsets, rows = assemble(header, tensors)
            return cls(states, offsets, tensors["token_ids"], header["fingerprint"], rows)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is no valid context cache: {error}; encode the contexts again.") from error


@dataclass(frozen=True, eq=False)
class ProjectedContext:
    """Keys and values of every cross-attention projection for the rows of a cache: reusable over turns and requests.

    Args:
        keys, values: one entry a projection, `[num_tokens, kv_heads, head_dim]`, tensors or `QuantizedTensor`s.
        rows: which tokens each row reads (`ContextRows`).
        cache: the cache they came from.
        projections: the model's modules that made them; another model refuses them.
        implementation: the backend that reads them, decided when they were projected.
        weights: sample of their weights at that time; a model that was trained since refuses. None: not compared.
        assistant: what assisted decoding drafts from: the draft model's own context, a `ContextLookup`, or None.
    """

    keys: tuple
    values: tuple
    rows: object
    cache: ContextCache
    projections: object
    implementation: str
    weights: bytes | None = None
    assistant: object = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __deepcopy__(self, memo) -> "ProjectedContext":
        # immutable, as the cache is
        return self

    def memory_report(self) -> MemoryReport:
        """What a request that reads this costs: file, mapped and resident bytes; printable."""
        return memory_report(self.cache, self)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the cache they came from."""
        return self.cache.fingerprint

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, scales included."""
        return sum(state.nbytes for state in (*self.keys, *self.values))

    def select(self, indices: "Iterable[int] | Iterable[bool] | Tensor") -> "ProjectedContext":
        """One row for each of `indices`, or for each row that a mask is true for; nothing is copied."""
        indices = as_indices(indices, len(self))
        cache = None if self.cache is None else self.cache.select(indices)
        chosen = tuple(self.rows.context_index[row] for row in indices)
        return replace(self, rows=replace(self.rows, context_index=chosen), cache=cache)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ProjectedContext":
        """The keys and values on `device`."""

        def move(states: tuple) -> tuple:
            return tuple(map_state(s, lambda t: t.to(device, non_blocking=non_blocking)) for s in states)

        return replace(self, keys=move(self.keys), values=move(self.values))
