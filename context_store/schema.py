"""Tables of a catalogue, one SQLite file a namespace, and how its connections are opened."""

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

FORMAT = "xcllama-context-store"
FORMAT_VERSION = 1
CATALOGUE_NAME = "catalogue.sqlite3"

# `texts` stands apart from `documents`: what is scanned at opening stays small
SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE shards(
    shard INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    nbytes INTEGER NOT NULL,
    document_bytes INTEGER NOT NULL DEFAULT 0,
    header_checksum BLOB,
    state TEXT NOT NULL
);
CREATE TABLE documents(
    document INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    content_hash TEXT NOT NULL,
    shard INTEGER NOT NULL,
    start INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    nbytes INTEGER NOT NULL,
    checksum BLOB NOT NULL,
    metadata TEXT NOT NULL,
    created REAL NOT NULL,
    last_used REAL NOT NULL,
    expires REAL NOT NULL,
    damaged INTEGER NOT NULL DEFAULT 0,
    version INTEGER NOT NULL
);
CREATE INDEX documents_by_shard ON documents(shard);
CREATE INDEX documents_by_version ON documents(version);
CREATE INDEX documents_by_use ON documents(last_used);
CREATE INDEX documents_by_expiry ON documents(expires);
CREATE TABLE removed(version INTEGER NOT NULL, id TEXT NOT NULL);
CREATE INDEX removed_by_version ON removed(version);
CREATE TABLE pins(handle TEXT NOT NULL, id TEXT NOT NULL, expires REAL NOT NULL, PRIMARY KEY(handle, id))
    WITHOUT ROWID;
CREATE INDEX pins_by_id ON pins(id);
CREATE TABLE texts(document INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE VIRTUAL TABLE words USING fts5(
    text, content='texts', content_rowid='document', tokenize='porter unicode61 remove_diacritics 2'
);
CREATE TRIGGER texts_insert AFTER INSERT ON texts BEGIN
    INSERT INTO words(rowid, text) VALUES (new.document, new.text);
END;
CREATE TRIGGER texts_delete AFTER DELETE ON texts BEGIN
    INSERT INTO words(words, rowid, text) VALUES ('delete', old.document, old.text);
END;
CREATE TRIGGER documents_delete AFTER DELETE ON documents BEGIN
    DELETE FROM texts WHERE document = old.document;
END;
"""


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def connect(path: Path, read_only: bool) -> sqlite3.Connection:
    """A connection in autocommit mode: WAL and synchronous=FULL, or read-only."""
    if read_only:
        # without a log that a writer left, a folder that cannot be written has no shared memory file either
        wal = path.with_name(path.name + "-wal")
        alone = not os.access(path.parent, os.W_OK) and not (wal.exists() and wal.stat().st_size)
        uri = f"file:{quote(str(path.absolute()))}?mode=ro" + ("&immutable=1" if alone else "")
    else:
        uri = f"file:{quote(str(path.absolute()))}"
    connection = sqlite3.connect(uri, uri=True, timeout=60, isolation_level=None, check_same_thread=False)
    if not read_only:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA cache_size = -16384")
    return connection


def check_meta(meta: dict[str, str], path: Path) -> None:
    """Refuse a catalogue of another format.

    Raises:
        ValueError: no store, or a newer format.
    """
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} is no context store: its format is {meta.get('format')!r}, not {FORMAT!r}.")
    if not meta.get("format_version", "").isdecimal() or int(meta["format_version"]) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {meta.get('format_version')!r}, this code reads up to {FORMAT_VERSION}; "
            "update the code."
        )
