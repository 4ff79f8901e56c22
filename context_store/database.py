"""The SQLite file of a namespace: one connection a process, transactions, the store's description."""

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .schema import CATALOGUE_NAME, FORMAT, FORMAT_VERSION, SCHEMA, check_meta, connect, sync_folder

_INHERITED: list[sqlite3.Connection] = []


class Database:
    """A namespace's SQLite file; every method may be called from several threads, and processes share the file.

    Args:
        folder: of the namespace.
        read_only: change nothing.
        meta: the description of a store that is made where there is none.

    Raises:
        ValueError: no store, or one of a newer format.
        FileNotFoundError: `read_only` and there is none.
    """

    def __init__(self, folder: Path, read_only: bool, meta: dict[str, str] | None = None):
        self.path = folder / CATALOGUE_NAME
        self.read_only = read_only
        if read_only and not self.path.is_file():
            raise FileNotFoundError(f"no context store at {self.path}.")
        try:
            self._open()
            if meta is not None and not read_only:
                self._create(meta)
            self.meta = dict(self.rows("SELECT key, value FROM meta"))
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is no context store: {error}.") from error
        check_meta(self.meta, self.path)

    def _open(self) -> None:
        """Connect; in a forked child again."""
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._connection = connect(self.path, self.read_only)

    def _committed(self) -> None:
        """What follows each commit of this connection."""

    def _create(self, meta: dict[str, str]) -> None:
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
            fields = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "version": "0", "removed_floor": "0"}
            connection.executemany("INSERT INTO meta VALUES (?, ?)", list((fields | meta).items()))
        sync_folder(self.path.parent)

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
                self._committed()
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise OSError(f"{self.path} could not be written: {error}.") from error
                raise

    def set_meta(self, key: str, value: str) -> None:
        """Change an entry of the store's description."""
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
        self.meta[key] = value

    def rows(self, query: str, values: Sequence = ()) -> list[tuple]:
        """The rows of a query."""
        with self.lock:
            return self._connection.execute(query, values).fetchall()
