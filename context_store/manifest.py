"""A snapshot's description: manifest.json, written last, so that a folder without it is no snapshot.

A snapshot is a folder on any fsspec file system: `manifest.json`, `README.md` (card), `catalogue/part-*.parquet` (a
row a document: id, text, metadata, where its states lie, checksum) and `shards/*.safetensors`.
"""

import hashlib
import io
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
from fsspec import AbstractFileSystem

from .schema import sync_folder

FORMAT = "xcllama-context-snapshot"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
PART_SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("text", pyarrow.string()),
        ("metadata", pyarrow.string()),
        ("content_hash", pyarrow.string()),
        ("shard", pyarrow.string()),
        ("start", pyarrow.int64()),
        ("tokens", pyarrow.int64()),
        ("nbytes", pyarrow.int64()),
        ("checksum", pyarrow.binary(16)),
    ]
)


@dataclass(frozen=True)
class ShardEntry:
    """A shard of a snapshot: its file, size, SHA-256 and the checksum of its header (hexadecimal)."""

    name: str
    nbytes: int
    sha256: str
    header_checksum: str


@dataclass(frozen=True)
class PartEntry:
    """A Parquet part of a snapshot's catalogue."""

    name: str
    nbytes: int
    sha256: str
    documents: int


@dataclass(frozen=True)
class Manifest:
    """What a snapshot holds and what made it."""

    fingerprint: str
    dtype: str
    template_version: str
    namespace: str
    model: str
    documents: int
    tokens: int
    shards: list[ShardEntry]
    catalogue: list[PartEntry]
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    def to_json(self) -> str:
        """The manifest as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Parse a manifest.

        Raises:
            ValueError: no manifest, or one of a newer format.
        """
        try:
            fields = json.loads(text)
            if fields.get("format") != FORMAT or int(fields["format_version"]) > FORMAT_VERSION:
                raise ValueError(
                    f"its format is {fields.get('format')!r} version {fields.get('format_version')!r}, this code "
                    f"reads {FORMAT!r} up to version {FORMAT_VERSION}"
                )
            fields["shards"] = [ShardEntry(**entry) for entry in fields["shards"]]
            fields["catalogue"] = [PartEntry(**entry) for entry in fields["catalogue"]]
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{where} is no snapshot's manifest: {error}.") from error


class Folder:
    """A folder on any fsspec file system; files appear in it whole or not at all.

    Args:
        url: a local path, or an fsspec URL: "s3://bucket/folder", "hf://datasets/org/name", ...
        storage_options: of the file system; None: `FSSPEC_...` variables and its own defaults.
    """

    def __init__(self, url: str | Path, storage_options: dict | None = None):
        self.url = str(url).rstrip("/") or "/"
        self.fs: AbstractFileSystem
        self.fs, self.root = fsspec.core.url_to_fs(self.url, **(storage_options or {}))
        self.root = self.root.rstrip("/")
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def path(self, name: str) -> str:
        """A file of the folder, for `fs`."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file is there, now (listings are not cached)."""
        self.fs.invalidate_cache()
        return self.fs.exists(self.path(name))

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: it is not there.
        """
        return self.fs.cat_file(self.path(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        if not self.is_local:
            self.fs.pipe_file(self.path(name), content)
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            sync_folder(target.parent)
        finally:
            partial.unlink(missing_ok=True)

    def upload(self, local: Path, name: str) -> None:
        """Move or copy a complete local file here under its name."""
        if not self.is_local:
            self.fs.put_file(str(local), self.path(name))
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            with open(local, "rb") as source, open(partial, "wb") as file:
                while chunk := source.read(1 << 22):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            sync_folder(target.parent)
        finally:
            partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_part(folder: Folder, number: int, rows: list[dict], fields: dict[str, str] | None = None) -> PartEntry:
    """Write a Parquet part of a catalogue; `fields` go into the file's own metadata."""
    table = pyarrow.Table.from_pylist(rows, PART_SCHEMA)
    if fields:
        table = table.replace_schema_metadata(fields)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd", row_group_size=4096)
    content = buffer.getvalue()
    name = f"catalogue/part-{number:06d}.parquet"
    folder.write(name, content)
    return PartEntry(name, len(content), hashlib.sha256(content).hexdigest(), len(rows))
