"""What each visitor has encoded: bounded in bytes and in time, and looked up by the visitor's own key only."""

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from documents import DocumentError

MEBIBYTE = 2**20


@dataclass(frozen=True, eq=False)
class Document:
    """A text and its context cache.

    Args:
        name: unique among the visitor's documents.
        text: what was encoded.
        cache: a `ContextCache` with one row a passage.
        passages: (start, stop) of each passage in the characters of the text.
        seconds: what encoding took.
    """

    name: str
    text: str
    cache: object
    passages: tuple[tuple[int, int], ...]
    seconds: float

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the document holds."""
        return self.cache.nbytes + self.cache.token_ids.nbytes + sys.getsizeof(self.text)


@dataclass(eq=False)
class Visitor:
    """Documents by name, and when the visitor was last here."""

    documents: dict[str, Document] = field(default_factory=dict)
    seen: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all documents."""
        return sum(document.nbytes for document in self.documents.values())


class Visitors:
    """Visitors by key; those that were away too long, or longest when memory is short, are forgotten.

    Args:
        visitor_bytes, total_bytes: most bytes of documents, of one visitor and of all.
        max_documents: most documents of a visitor.
        idle_seconds: how long a visitor may be away.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        visitor_bytes: int = 32 * MEBIBYTE,
        total_bytes: int = 512 * MEBIBYTE,
        max_documents: int = 12,
        idle_seconds: float = 1800.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.visitor_bytes, self.total_bytes = visitor_bytes, total_bytes
        self.max_documents, self.idle_seconds = max_documents, idle_seconds
        self._clock = clock
        self._lock = threading.RLock()
        # least recently seen first
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._visitors)

    @property
    def nbytes(self) -> int:
        """Bytes of all documents of all visitors."""
        with self._lock:
            return sum(visitor.nbytes for visitor in self._visitors.values())

    def get(self, key: str) -> Visitor:
        """The visitor with `key`, new or known."""
        with self._lock:
            self.sweep()
            visitor = self._visitors.setdefault(key, Visitor())
            visitor.seen = self._clock()
            self._visitors.move_to_end(key)
            return visitor

    def documents(self, key: str, names: Sequence[str]) -> list[Document]:
        """The visitor's documents with `names`, in that order.

        Raises:
            DocumentError: one of them is no longer there.
        """
        documents = self.get(key).documents
        if any(name not in documents for name in names):
            minutes = round(self.idle_seconds / 60)
            raise DocumentError(
                f"Your documents are no longer here: they are kept for {minutes} minutes, less when many visit. "
                "Please add them again."
            )
        return [documents[name] for name in names]

    def check_room(self, key: str, nbytes: int) -> None:
        """Raise if the visitor has no room for another document of `nbytes`.

        Raises:
            DocumentError: too many documents, or too many bytes.
        """
        visitor = self.get(key)
        if len(visitor.documents) >= self.max_documents:
            raise DocumentError(f"You have {self.max_documents} documents, as many as fit. Remove one first.")
        if visitor.nbytes + nbytes > self.visitor_bytes:
            left, needed = max(0, self.visitor_bytes - visitor.nbytes) / MEBIBYTE, nbytes / MEBIBYTE
            raise DocumentError(
                f"This document needs about {needed:.1f} MiB of the cache and you have {left:.1f} MiB left. "
                "Remove a document, or add a shorter one."
            )

    def add(self, key: str, document: Document) -> None:
        """Keep a document; visitors who were away longest make room for it.

        Raises:
            DocumentError: no room among the visitor's own documents.
        """
        with self._lock:
            self.check_room(key, document.nbytes)
            self.get(key).documents[document.name] = document
            while self.nbytes > self.total_bytes and len(self._visitors) > 1:
                self._visitors.popitem(last=False)

    def remove(self, key: str, names: Sequence[str]) -> None:
        """Drop some of a visitor's documents."""
        with self._lock:
            for name in names:
                self.get(key).documents.pop(name, None)

    def forget(self, key: str) -> None:
        """Drop everything of a visitor."""
        with self._lock:
            self._visitors.pop(key, None)

    def sweep(self) -> None:
        """Forget those who were away too long."""
        with self._lock:
            oldest = self._clock() - self.idle_seconds
            while self._visitors and next(iter(self._visitors.values())).seen < oldest:
                self._visitors.popitem(last=False)


def unique_name(name: str, taken: Sequence[str], length: int = 60) -> str:
    """`name`, short and unlike all in `taken`."""
    name = "".join(letter for letter in " ".join(name.split()) if letter.isprintable())[:length] or "document"
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name} ({number})"
    return unique
