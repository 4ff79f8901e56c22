"""The catalogue of one namespace, one SQLite file: which documents there are, and where their states lie.

A document is one or several passages; a passage reads states, which are named by what was encoded: two passages with
the same tokens share them. What nothing refers to any more goes with the last reference, in the same transaction.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_SH
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from xcllama.durable import locked, sync_folder

FORMAT, FORMAT_VERSION = "xcllama-context-store", 2
CATALOGUE_NAME = "catalogue.sqlite3"
FOREVER = float("inf")
SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE shards(
    shard INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, nbytes INTEGER NOT NULL,
    state_bytes INTEGER NOT NULL DEFAULT 0, header_checksum BLOB, live INTEGER NOT NULL
);
CREATE TABLE states(
    state INTEGER PRIMARY KEY AUTOINCREMENT, content BLOB NOT NULL UNIQUE, shard INTEGER NOT NULL,
    start INTEGER NOT NULL, tokens INTEGER NOT NULL, nbytes INTEGER NOT NULL, checksum BLOB NOT NULL,
    damaged INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX states_by_shard ON states(shard);
CREATE INDEX damaged_states ON states(state) WHERE damaged;
CREATE TABLE documents(
    document INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, digest TEXT NOT NULL, metadata TEXT NOT NULL,
    last_used REAL NOT NULL, expires REAL NOT NULL
);
CREATE INDEX documents_by_use ON documents(last_used);
CREATE INDEX documents_by_expiry ON documents(expires);
CREATE TABLE texts(
    document INTEGER PRIMARY KEY REFERENCES documents ON DELETE CASCADE, text TEXT NOT NULL
);
CREATE TABLE passages(
    passage INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
    position INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL, state INTEGER NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX passages_by_document ON passages(document, position);
CREATE INDEX passages_by_state ON passages(state);
CREATE TABLE pins(
    handle TEXT NOT NULL, document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE, expires REAL NOT NULL,
    PRIMARY KEY(handle, document)
) WITHOUT ROWID;
CREATE INDEX pins_by_document ON pins(document);
CREATE VIRTUAL TABLE words USING fts5(text, tokenize="porter unicode61 remove_diacritics 2 categories 'L* N* M* Co'");
CREATE TRIGGER passage_deleted AFTER DELETE ON passages BEGIN
    DELETE FROM words WHERE rowid = old.passage;
    DELETE FROM states WHERE state = old.state AND NOT EXISTS (SELECT 1 FROM passages WHERE state = old.state);
END;
"""
LOCATE = (
    "SELECT document, states.state, shard, states.start, tokens, checksum FROM documents "
    "JOIN passages USING (document) JOIN states USING (state) WHERE id = ? AND expires > ?"
)
_INHERITED: list[sqlite3.Connection] = []


class Location(NamedTuple):
    """Where the states of a passage lie: numbers of its document, states and shard; tokens count in the shard."""

    document: int
    state: int
    shard: int
    start: int
    tokens: int
    checksum: bytes


@dataclass(frozen=True)
class NewState:
    """States in a shard that is on disk, by the digest of what was encoded."""

    content: bytes
    start: int
    tokens: int
    nbytes: int
    checksum: bytes


class NewPassage(NamedTuple):
    """Characters of a document's text, what the words index holds of them, and the content that is encoded."""

    start: int
    stop: int
    text: str
    words: str
    content: bytes


@dataclass(frozen=True)
class NewDocument:
    """A document to enter; `metadata` is JSON, or None to keep what there is."""

    id: str
    text: str
    digest: str
    metadata: str | None
    expires: float
    passages: Sequence[NewPassage]


class Catalogue:
    """A namespace's SQLite file; every method may be called from several threads, and processes share the file.

    Args:
        folder: of the namespace.
        read_only: change nothing.
        meta: the description of a store that is made where there is none.

    Raises:
        ValueError: no store, or one of another format.
        FileNotFoundError: `read_only` and there is none.
    """

    def __init__(self, folder: Path, read_only: bool, meta: Mapping[str, str] | None = None):
        self.path, self.read_only = folder / CATALOGUE_NAME, read_only
        if read_only and not self.path.is_file():
            raise FileNotFoundError(f"no context store at {self.path}.")
        try:
            self._open()
            if meta is not None and not read_only:
                self._create(meta)
            self._check_format()
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is no context store: {error}.") from error

    def _open(self) -> None:
        self._pid, self._lock = os.getpid(), threading.RLock()
        self._connection = _connect(self.path, self.read_only)

    def _create(self, meta: Mapping[str, str]) -> None:
        with self.transaction() as connection:
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                return
            # `executescript` would commit: a store that a crash cut in half must not exist
            statement = ""
            for line in SCHEMA.splitlines():
                statement += line + "\n"
                if sqlite3.complete_statement(statement):
                    connection.execute(statement)
                    statement = ""
            fields = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "max_bytes": "", "model": "", **meta}
            connection.executemany("INSERT INTO meta VALUES (?, ?)", list(fields.items()))
        sync_folder(self.path.parent)

    def _check_format(self) -> None:
        meta = self.meta
        if meta.get("format") != FORMAT:
            raise ValueError(f"{self.path} is no context store: its format is {meta.get('format')!r}, not {FORMAT!r}.")
        if meta.get("format_version") != str(FORMAT_VERSION):
            raise ValueError(
                f"{self.path} has format version {meta.get('format_version')!r}, this code reads {FORMAT_VERSION}; "
                "update the code, or add the documents to a new store."
            )
        if wrong := self.rows("SELECT name FROM shards WHERE name GLOB '*[^0-9A-Za-z._-]*' OR name GLOB '.*' LIMIT 1"):
            raise ValueError(f"{self.path} names a shard {wrong[0][0]!r:.80}, which is no file of its folder.")

    @property
    def meta(self) -> dict[str, str]:
        """The description of the store, as it is now."""
        return dict(self.rows("SELECT key, value FROM meta"))

    @property
    def lock(self) -> threading.RLock:
        """Guards the connection; a forked child gets its own of both."""
        if self._pid != os.getpid():
            # closing an inherited connection could disturb the parent's: it is left alone
            _INHERITED.append(self._connection)
            self._open()
        return self._lock

    def close(self) -> None:
        """Close the connection."""
        with self.lock:
            self._connection.close()

    def check_writable(self) -> None:
        """Raise a ValueError if the catalogue was opened read-only."""
        if self.read_only:
            raise ValueError(f"{self.path.parent} is open read-only; open it with `read_only=False` to change it.")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, one writer at a time, on disk when it ends.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        self.check_writable()
        with self.lock:
            connection = self._connection
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise OSError(f"{self.path} could not be written: {error}.") from error
                raise

    def rows(self, query: str, values: Sequence = ()) -> list[tuple]:
        """The rows of a query."""
        with self.lock:
            return self._connection.execute(query, values).fetchall()

    def set_meta(self, key: str, value: str) -> None:
        """Change an entry of the store's description."""
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def locate(self, document_id: str, position: int | None = None) -> list[Location]:
        """Where the passages of a document lie, in order, or one of them; empty where there is none (any more)."""
        where, values = ("", ()) if position is None else (" AND position = ?", (position,))
        # no document has an id with half a surrogate pair, which SQLite would not take
        known = document_id.isascii() or document_id.encode(errors="ignore").decode() == document_id
        rows = self.rows(f"{LOCATE}{where} ORDER BY position", (document_id, time.time(), *values)) if known else ()
        return list(map(Location._make, rows))

    def text(self, document_id: str) -> tuple[str, dict] | None:
        """Text and metadata of a document."""
        query = "SELECT text, metadata FROM documents JOIN texts USING (document) WHERE id = ? AND expires > ?"
        rows = self.rows(query, (document_id, time.time()))
        return (rows[0][0], json.loads(rows[0][1])) if rows else None

    def unchanged(self, document_id: str, digest: str) -> tuple[str, float] | None:
        """Metadata and expiry of a document of this digest, if it is there, whole and undamaged."""
        query = (
            "SELECT metadata, expires FROM documents WHERE id = ? AND digest = ? AND NOT EXISTS (SELECT 1 FROM "
            "passages JOIN states USING (state) WHERE passages.document = documents.document AND damaged)"
        )
        rows = self.rows(query, (document_id, digest))
        return rows[0] if rows else None

    def has_states(self, content: bytes) -> bool:
        """Whether undamaged states of this content are there."""
        return bool(self.rows("SELECT 1 FROM states WHERE content = ? AND NOT damaged", (content,)))

    def damaged(self) -> list[tuple[bytes, str, str]]:
        """Content and text of each passage whose states are damaged, and the id of its document."""
        return self.rows(
            "SELECT content, text, id FROM states JOIN passages USING (state) JOIN documents USING (document) "
            "WHERE damaged ORDER BY document, position"
        )

    def shard(self, shard: int) -> tuple[str, int, bytes] | None:
        """Name, size and header checksum of a shard; None if it is gone."""
        rows = self.rows("SELECT name, nbytes, header_checksum FROM shards WHERE shard = ? AND live", (shard,))
        return rows[0] if rows else None

    def totals(self) -> dict[str, int]:
        """Counts and sizes of everything in the namespace."""
        columns = {
            "documents": "SELECT COUNT(*) FROM documents",
            "passages": "SELECT COUNT(*) FROM passages",
            "tokens": "SELECT TOTAL(tokens) FROM states",
            "state_bytes": "SELECT TOTAL(nbytes) FROM states",
            "damaged_states": "SELECT COUNT(*) FROM states WHERE damaged",
            "shards": "SELECT COUNT(*) FROM shards",
            "shard_bytes": "SELECT TOTAL(nbytes) FROM shards",
            "pinned": "SELECT COUNT(DISTINCT document) FROM pins WHERE expires > unixepoch()",
        }
        row = self.rows("SELECT " + ", ".join(f"({query})" for query in columns.values()))[0]
        return dict(zip(columns, map(int, row), strict=True))

    def commit(
        self,
        shard: tuple[str, int, bytes] | None,
        states: Sequence[NewState],
        documents: Iterable[NewDocument],
        kind: str,
    ) -> list[NewDocument]:
        """Enter a shard that is on disk, its states, and documents: from then on they are served.

        Args:
            shard: name, size and checksum of the header.
            kind: names, dtypes and widths of the shard's tensors (`shards.describe`).

        Returns:
            Documents that were left out: states that they share were evicted or damaged meanwhile.

        Raises:
            ValueError: the namespace holds states of another kind.
        """
        with self.transaction() as connection:
            if shard is not None:
                connection.execute("INSERT OR IGNORE INTO meta VALUES ('kind', ?)", (kind,))
                stored = connection.execute("SELECT value FROM meta WHERE key = 'kind'").fetchone()[0]
                if stored != kind:
                    raise ValueError(f"{self.path.parent} holds states {stored}, these are {kind}.")
                connection.execute("DELETE FROM shards WHERE name = ? AND NOT live", shard[:1])
                number = enter_shard(connection, *shard, sum(new.nbytes for new in states))
                enter_states(connection, [(number, new) for new in states])
            return [document for document in documents if not enter_document(connection, document)]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep `upkeep.clean` away from a shard's first byte to its commit."""
        with locked(self.path.with_name("writers.lock"), LOCK_SH):
            yield

    def drop_dead_shards(self) -> None:
        """Delete shards without states, and their files."""
        with self.transaction() as connection:
            dead = connection.execute(
                "DELETE FROM shards WHERE live AND NOT EXISTS (SELECT 1 FROM states WHERE shard = shards.shard) "
                "RETURNING name"
            ).fetchall()
        # after the commit: whoever still finds the file listed can open it
        for (name,) in dead:
            (self.path.parent / "shards" / name).unlink(missing_ok=True)

    def update(self, document_id: str, digest: str, metadata: str | None, expires: float) -> None:
        """Replace metadata (None: keep) and expiry of a document, if it is still that of this digest."""
        with self.transaction() as connection:
            connection.execute(
                "UPDATE documents SET metadata = IFNULL(?, metadata), expires = ? WHERE id = ? AND digest = ?",
                (metadata, expires, document_id, digest),
            )

    def mark_damaged(self, places: Iterable[Location]) -> None:
        """Record that states failed their checksum where they lie: `add` and `repair` encode them again."""
        rows = [(place.state, place.shard, place.start) for place in places]
        with self.transaction() as connection:
            connection.executemany("UPDATE states SET damaged = 1 WHERE state = ? AND shard = ? AND start = ?", rows)


def _connect(path: Path, read_only: bool) -> sqlite3.Connection:
    """A connection in autocommit mode: WAL and synchronous=FULL, or read-only."""
    uri = f"file:{quote(str(path.absolute()))}"
    if read_only:
        # without a log that a writer left, a folder that cannot be written has no shared memory file either
        wal = path.with_name(path.name + "-wal")
        alone = not os.access(path.parent, os.W_OK) and not (wal.exists() and wal.stat().st_size)
        uri += "?mode=ro" + ("&immutable=1" if alone else "")
    connection = sqlite3.connect(uri, uri=True, timeout=60, isolation_level=None, check_same_thread=False)
    if not read_only:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA cache_size = -16384")
    return connection


def enter_shard(connection: sqlite3.Connection, name: str, nbytes: int, header_checksum: bytes, size: int) -> int:
    """Enter a shard that is on disk, with the bytes of its states; returns its number."""
    return connection.execute(
        "INSERT INTO shards(name, nbytes, header_checksum, state_bytes, live) VALUES (?, ?, ?, ?, 1)",
        (name, nbytes, header_checksum, size),
    ).lastrowid


def enter_states(connection: sqlite3.Connection, states: Iterable[tuple[int, NewState]]) -> None:
    """Enter (shard, states); of equal ones the first stay, unless they are damaged."""
    connection.executemany(
        "INSERT INTO states(content, shard, start, tokens, nbytes, checksum) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT(content) DO UPDATE SET shard = excluded.shard, start = excluded.start, tokens = excluded.tokens, "
        "nbytes = excluded.nbytes, checksum = excluded.checksum, damaged = 0 WHERE damaged",
        [(new.content, shard, new.start, new.tokens, new.nbytes, new.checksum) for shard, new in states],
    )


def enter_document(connection: sqlite3.Connection, document: NewDocument) -> bool:
    """Enter or replace a document; returns whether all its states are there, otherwise nothing changes."""
    query = "SELECT state FROM states WHERE content = ? AND NOT damaged"
    states = [connection.execute(query, (passage.content,)).fetchone() for passage in document.passages]
    if None in states:
        return False
    number = connection.execute(
        "INSERT INTO documents(id, digest, metadata, last_used, expires) VALUES (?1, ?2, IFNULL(?3, '{}'), ?4, ?5) "
        "ON CONFLICT(id) DO UPDATE SET digest = ?2, metadata = IFNULL(?3, metadata), last_used = ?4, expires = ?5 "
        "RETURNING document",
        (document.id, document.digest, document.metadata, time.time(), document.expires),
    ).fetchone()[0]
    connection.execute("INSERT OR REPLACE INTO texts VALUES (?, ?)", (number, document.text))
    old = connection.execute("SELECT MAX(passage) FROM passages WHERE document = ?", (number,)).fetchone()[0]
    for position, (passage, state) in enumerate(zip(document.passages, states, strict=True)):
        entered = connection.execute(
            "INSERT INTO passages(document, position, start, stop, state, text) VALUES (?, ?, ?, ?, ?, ?)",
            (number, position, passage.start, passage.stop, state[0], passage.text),
        ).lastrowid
        connection.execute("INSERT INTO words(rowid, text) VALUES (?, ?)", (entered, passage.words))
    # behind the new ones: states that both read stay
    connection.execute("DELETE FROM passages WHERE document = ? AND passage <= ?", (number, old or 0))
    return True
