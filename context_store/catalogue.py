"""The catalogue of one namespace: which documents there are, where their states lie, and their texts (FTS5)."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .changes import Changes
from .database import Database
from .locations import Location, Locations

FOREVER = float("inf")
REMOVALS_KEPT = 100_000
# seconds for which the token of `Changes` is believed: a writer may die between its commit and the token
BELIEVED = 0.1


@dataclass(frozen=True)
class NewDocument:
    """A document about to be committed; `start` and `tokens` count tokens in its shard."""

    id: str
    text: str
    content_hash: str
    metadata: dict
    start: int
    tokens: int
    nbytes: int
    checksum: bytes
    expires: float = FOREVER


class StoredDocument(NamedTuple):
    """A document of the catalogue: its number, and where it lies in its shard."""

    number: int
    id: str
    start: int
    tokens: int
    checksum: bytes


def pieces(values: Sequence, size: int = 500) -> Iterator[Sequence]:
    """Slices small enough for one SQL statement's parameters."""
    return (values[start : start + size] for start in range(0, len(values), size))


def marks(values: Sequence) -> str:
    """Placeholders of an IN list."""
    return ",".join("?" * len(values))


class Catalogue(Database):
    """What a namespace holds, and the locations of its documents in memory; arguments and errors of `Database`."""

    def __init__(self, folder: Path, read_only: bool, meta: dict[str, str] | None = None):
        # what searches found out about words, and the number of documents then
        self.matches: dict = {}
        self.matched_size = 0
        super().__init__(folder, read_only, meta)

    def _open(self) -> None:
        super()._open()
        self._changes = Changes(self.path.parent, self.read_only)
        self.locations = Locations()
        self.version, self._data_version = -1, None
        self._seen, self._believed = None, 0.0

    def _committed(self) -> None:
        # this connection's own changes do not move `data_version`
        self._data_version = None
        self._changes.renew()

    # locations

    def refresh(self, ask: bool = False) -> None:
        """Take over what any process committed since the last call; `ask`: and has not told of yet."""
        token, now = self._changes.token, time.monotonic()
        if not ask and token is not None and token == self._seen and now < self._believed:
            return
        with self.lock:
            self._take_over(self._connection)
        self._seen, self._believed = token, now + BELIEVED

    def _take_over(self, connection: sqlite3.Connection) -> None:
        data_version = connection.execute("PRAGMA data_version").fetchone()[0]
        if data_version == self._data_version:
            return
        connection.execute("BEGIN")
        try:
            meta = dict(connection.execute("SELECT key, value FROM meta WHERE key IN ('version', 'removed_floor')"))
            if int(meta["removed_floor"]) > self.version >= 0:
                self.locations, self.version = Locations(), -1
            if self.version >= 0:
                for (gone,) in connection.execute("SELECT id FROM removed WHERE version > ?", (self.version,)):
                    self.locations.set(gone, None)
            for row in connection.execute(
                "SELECT id, document, shard, start, tokens, expires FROM documents WHERE version > ?",
                (self.version,),
            ):
                self.locations.set(row[0], Location(*row[1:]))
            self.version, self._data_version = int(meta["version"]), data_version
        finally:
            connection.execute("COMMIT")

    def locate(self, document_id: str) -> Location | None:
        """Where a document lies as of the last `refresh`; None if there is none."""
        return self.locations.get(document_id)

    # documents

    def known(self, ids: Sequence[str]) -> dict[str, tuple[str, int, str, float]]:
        """(content hash, damaged, metadata, expires) of those `ids` that the catalogue has."""
        found = {}
        with self.lock:
            for part in pieces(ids):
                rows = self._connection.execute(
                    f"SELECT id, content_hash, damaged, metadata, expires FROM documents WHERE id IN ({marks(part)})",
                    part,
                )
                found |= {row[0]: row[1:] for row in rows}
        return found

    def checksums(self, documents: Sequence[int]) -> dict[int, tuple[bytes, str, int]]:
        """(checksum, id, damaged) of documents by their numbers."""
        found = {}
        with self.lock:
            for part in pieces(documents):
                query = f"SELECT document, checksum, id, damaged FROM documents WHERE document IN ({marks(part)})"
                found |= {row[0]: row[1:] for row in self._connection.execute(query, part)}
        return found

    def text(self, document_id: str) -> tuple[str, dict, float] | None:
        """Text, metadata and expiry of a document."""
        with self.lock:
            row = self._connection.execute(
                "SELECT text, metadata, expires FROM documents JOIN texts USING (document) WHERE id = ?",
                (document_id,),
            ).fetchone()
        return row and (row[0], json.loads(row[1]), row[2])

    def next_version(self, connection: sqlite3.Connection) -> int:
        """A number above that of every earlier change."""
        connection.execute("UPDATE meta SET value = value + 1 WHERE key = 'version'")
        return int(connection.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()[0])

    def remove(self, connection: sqlite3.Connection, ids: Sequence[str], version: int) -> None:
        """Delete documents; readers drop them at their next `refresh`."""
        for part in pieces(ids):
            connection.execute(f"DELETE FROM documents WHERE id IN ({marks(part)})", part)
        connection.executemany("INSERT INTO removed VALUES (?, ?)", [(version, document_id) for document_id in ids])
        floor = connection.execute(
            "SELECT version FROM removed ORDER BY version DESC LIMIT 1 OFFSET ?", (REMOVALS_KEPT,)
        ).fetchone()
        if floor:
            connection.execute("DELETE FROM removed WHERE version <= ?", floor)
            connection.execute("UPDATE meta SET value = ? WHERE key = 'removed_floor'", (str(floor[0]),))

    def commit(self, name: str, nbytes: int, header_checksum: bytes, documents: Sequence[NewDocument]) -> int:
        """Enter a shard that is on disk and its documents; returns how many others of the same ids they replace."""
        now = time.time()
        with self.transaction() as connection:
            version = self.next_version(connection)
            connection.execute("DELETE FROM shards WHERE name = ? AND state = 'reserved'", (name,))
            size = sum(document.nbytes for document in documents)
            shard = self._enter_shard(connection, name, nbytes, size, header_checksum)
            replaced = 0
            for part in pieces([document.id for document in documents]):
                replaced += connection.execute(f"DELETE FROM documents WHERE id IN ({marks(part)})", part).rowcount
            for document in documents:
                number = connection.execute(
                    "INSERT INTO documents(id, content_hash, shard, start, tokens, nbytes, checksum, metadata, "
                    "created, last_used, expires, version) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (document.id, document.content_hash, shard, document.start, document.tokens, document.nbytes)
                    + (document.checksum, json.dumps(document.metadata, ensure_ascii=False), now, now)
                    + (document.expires, version),
                ).lastrowid
                connection.execute("INSERT INTO texts VALUES (?, ?)", (number, document.text))
        return replaced

    @staticmethod
    def _enter_shard(connection, name: str, nbytes: int, document_bytes: int, header_checksum: bytes) -> int:
        return connection.execute(
            "INSERT INTO shards(name, nbytes, document_bytes, header_checksum, state) VALUES (?, ?, ?, ?, 'live')",
            (name, nbytes, document_bytes, header_checksum),
        ).lastrowid

    def move(
        self, name: str, nbytes: int, header_checksum: bytes, moves: Iterable[tuple[tuple[int, int], int]]
    ) -> None:
        """Enter a shard on disk that holds documents of older ones: ((document, old shard), new start)."""
        with self.transaction() as connection:
            version = self.next_version(connection)
            shard = self._enter_shard(connection, name, nbytes, 0, header_checksum)
            # a document that was replaced or moved meanwhile is left alone
            connection.executemany(
                "UPDATE documents SET shard = ?, start = ?, version = ? WHERE document = ? AND shard = ?",
                [(shard, start, version, *source) for source, start in moves],
            )
            connection.execute(
                "UPDATE shards SET document_bytes = (SELECT TOTAL(nbytes) FROM documents WHERE documents.shard = ?) "
                "WHERE shard = ?",
                (shard, shard),
            )

    def documents_of(self, shard: int) -> list[StoredDocument]:
        """A shard's documents, in the order they lie in it."""
        with self.lock:
            rows = self._connection.execute(
                "SELECT document, id, start, tokens, checksum FROM documents WHERE shard = ? ORDER BY start", (shard,)
            )
            return [StoredDocument(*row) for row in rows]

    def live_shards(self) -> list[int]:
        """Numbers of all shards with documents."""
        with self.lock:
            return [row[0] for row in self._connection.execute("SELECT shard FROM shards WHERE state = 'live'")]

    def optimize(self) -> None:
        """Merge the search index and give free pages of the catalogue back."""
        with self.transaction() as connection:
            connection.execute("INSERT INTO words(words) VALUES ('optimize')")

    def touch(self, used: dict[int, float]) -> None:
        """Record when documents were last used, by their numbers."""
        with self.transaction() as connection:
            # a copy first: a thread that reads may still note a use
            rows = [(moment, number) for number, moment in list(used.items())]
            connection.executemany("UPDATE documents SET last_used = MAX(last_used, ?) WHERE document = ?", rows)

    def update(self, changes: Sequence[tuple[str, str, float]]) -> None:
        """Replace (metadata, expires) of documents whose text did not change."""
        with self.transaction() as connection:
            version = self.next_version(connection)
            rows = [(metadata, expires, version, document_id) for document_id, metadata, expires in changes]
            connection.executemany("UPDATE documents SET metadata = ?, expires = ?, version = ? WHERE id = ?", rows)

    def abandon(self, name: str) -> bool:
        """Give up a shard's reservation; returns whether the shard was never committed, so its file may go."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM shards WHERE name = ? AND state = 'reserved'", (name,))
            return not connection.execute("SELECT 1 FROM shards WHERE name = ?", (name,)).fetchone()

    # pins

    def pin(self, handle: str, ids: Sequence[str], expires: float) -> list[str]:
        """Keep documents from eviction; returns the ids that are not there, and then pins none."""
        with self.transaction() as connection:
            found = set()
            for part in pieces(ids):
                query = f"SELECT id FROM documents WHERE id IN ({marks(part)}) AND expires > ?"
                found |= {row[0] for row in connection.execute(query, (*part, time.time()))}
            missing = [document_id for document_id in ids if document_id not in found]
            if not missing:
                rows = [(handle, document_id, expires) for document_id in ids]
                connection.executemany("INSERT OR REPLACE INTO pins VALUES (?, ?, ?)", rows)
        return missing

    def unpin(self, handle: str) -> int:
        """Release a handle; returns how many pins it had."""
        with self.transaction() as connection:
            return connection.execute("DELETE FROM pins WHERE handle = ?", (handle,)).rowcount

    def pinned(self, ids: Sequence[str]) -> list[str]:
        """Those of `ids` that a handle holds."""
        found = []
        with self.lock:
            for part in pieces(ids):
                query = f"SELECT DISTINCT id FROM pins WHERE id IN ({marks(part)}) AND expires > ?"
                found += [row[0] for row in self._connection.execute(query, (*part, time.time()))]
        return found

    def mark_damaged(self, ids: Sequence[str]) -> None:
        """Record that the states of `ids` failed their checksum: `add` and `repair` encode them again."""
        with self.transaction() as connection:
            connection.executemany("UPDATE documents SET damaged = 1 WHERE id = ?", [(name,) for name in ids])

    def damaged(self) -> list[str]:
        """Ids of documents found damaged."""
        with self.lock:
            return [row[0] for row in self._connection.execute("SELECT id FROM documents WHERE damaged")]

    def shard(self, shard: int) -> tuple[str, int, bytes] | None:
        """Name, size and header checksum of a shard; None if it is gone."""
        with self.lock:
            return self._connection.execute(
                "SELECT name, nbytes, header_checksum FROM shards WHERE shard = ? AND state = 'live'", (shard,)
            ).fetchone()

    def totals(self) -> dict[str, int]:
        """Counts and sizes of everything in the namespace."""
        with self.lock:
            documents, tokens, nbytes, damaged = self._connection.execute(
                "SELECT COUNT(*), TOTAL(tokens), TOTAL(nbytes), TOTAL(damaged) FROM documents"
            ).fetchone()
            shards, on_disk = self._connection.execute("SELECT COUNT(*), TOTAL(nbytes) FROM shards").fetchone()
            pinned = self._connection.execute(
                "SELECT COUNT(DISTINCT id) FROM pins WHERE expires > ?", (time.time(),)
            ).fetchone()[0]
        return {
            "documents": documents,
            "tokens": int(tokens),
            "document_bytes": int(nbytes),
            "damaged": int(damaged),
            "shards": shards,
            "shard_bytes": int(on_disk),
            "pinned": pinned,
        }
