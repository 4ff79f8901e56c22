"""Documents on their way into a store: checked rows, the shard that is filled, reports."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from time import perf_counter

from torch import Tensor

from modeling_xcllama.context_cache import ContextCache

from .catalogue import NewDocument
from .shards import document_checksums, state_parts


@dataclass
class AddReport:
    """What `add` did: documents encoded, unchanged ones skipped, tokens and seconds of encoding."""

    encoded: int = 0
    skipped: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class VerifyReport:
    """What `verify` found: documents read, ids of damaged ones, and of those that were encoded again."""

    checked: int = 0
    damaged: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


def zip_documents(
    ids: Iterable[str], texts: Iterable[str], metadata: Iterable[dict | None] | None
) -> Iterator[tuple[str, str, dict | None]]:
    """(id, text, metadata) of each document, checked.

    Raises:
        ValueError: other counts of ids, texts and metadata, or a value that is no text.
    """
    given = [ids, texts] if metadata is None else [ids, texts, metadata]
    rows = zip(*given, strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except ValueError as error:
            raise ValueError(f"`ids`, `texts` and `metadata` must have one entry a document: {error}.") from error
        for name, value in (("ids", row[0]), ("texts", row[1])):
            if not isinstance(value, str) or name == "ids" and not value:
                raise ValueError(f"`{name}` must be strings (ids not empty), got {value!r:.80}.")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"`{name}` must be valid Unicode without lone surrogates, got {value!r:.80}."
                ) from error
        if len(row) == 3 and not isinstance(row[2], dict | None):
            raise ValueError(f"`metadata` must be a dict a document, got {row[2]!r:.80} for {row[0]!r}.")
        yield row[0], row[1], row[2] if len(row) == 3 else None


class PendingShard:
    """The documents of the next shard, and their states; `begun`: when the first came."""

    def __init__(self):
        self.rows: list[NewDocument] = []
        self.ids: set[str] = set()
        self.tokens = self.nbytes = 0
        self.begun = perf_counter()
        self._parts: list[dict[str, Tensor]] = []

    def append(self, document: NewDocument, parts: dict[str, Tensor]) -> None:
        """Put a document behind the others."""
        self.begun = self.begun if self.rows else perf_counter()
        self.rows.append(replace(document, start=self.tokens))
        self.ids.add(document.id)
        self.tokens += document.tokens
        self.nbytes += document.nbytes
        self._parts.append(parts)

    def parts(self) -> dict[str, list[Tensor]]:
        """All states by name, one tensor a document."""
        return {name: [part[name] for part in self._parts] for name in self._parts[0]}

    def clear(self) -> None:
        """Start the next shard."""
        self.__init__()


def split_documents(
    rows: list[tuple[str, str, dict | None]], hashes: list[str], cache: ContextCache, expires: float
) -> Iterator[tuple[NewDocument, dict[str, Tensor]]]:
    """The documents of a cache with their states; `start` is set when their shard is known."""
    sums, parts = document_checksums(cache), state_parts(cache)
    for index, (name, text, metadata) in enumerate(rows):
        start, end = cache.offsets[index], cache.offsets[index + 1]
        own = {key: part[start:end] for key, part in parts.items()}
        size = sum(part.nbytes for part in own.values())
        yield (
            NewDocument(name, text, hashes[index], metadata or {}, 0, end - start, size, sums[index], expires),
            own,
        )
