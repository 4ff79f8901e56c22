"""Snapshots served where they are: the catalogue is brought here, and of the shards what is read, by range."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from secrets import token_hex

import pyarrow.parquet

from xcllama.durable import durable, locked

from .catalogue import (
    CATALOGUE_NAME,
    FOREVER,
    Catalogue,
    NewDocument,
    NewPassage,
    NewState,
    enter_document,
    enter_shard,
    enter_states,
)
from .documents import index_text
from .manifest import FileEntry, Folder, resolve
from .shards import DamagedShardError, MappedShard, checksum

CACHE_BYTES = 8 << 30


def default_cache_folder() -> Path:
    """Where snapshots are kept: `$XCLLAMA_CACHE` or ~/.cache/xcllama, in snapshots/."""
    return Path(os.environ.get("XCLLAMA_CACHE") or Path.home() / ".cache" / "xcllama") / "snapshots"


class Snapshot:
    """A snapshot anywhere, for a `ContextStore` that serves it.

    Args:
        url: local folder, fsspec URL, or a data set's id on the Hub.
        revision: branch, tag or commit on the Hub.
        cache_folder: for the catalogue and what is fetched of shards; None: `default_cache_folder()`.
        cache_bytes: most bytes of fetched shards on this host.
        storage_options: of the file system.

    Raises:
        ValueError: no snapshot, or an altered catalogue.
    """

    def __init__(
        self,
        url: str | Path,
        revision: str | None = None,
        cache_folder: str | Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        storage_options: dict | None = None,
    ):
        self.source = Folder(resolve(url, revision), storage_options)
        self.manifest = self.source.manifest()
        digest = hashlib.sha256(self.manifest.to_json().encode()).hexdigest()[:24]
        self.folder, self.cache_bytes = Path(cache_folder or default_cache_folder()) / digest, cache_bytes
        self.ranges = self.folder / "ranges"
        self.ranges.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            if not (self.folder / "catalogue" / CATALOGUE_NAME).is_file():
                self._import_catalogue()
        self._entries = {entry.file_name: entry for entry in self.manifest.shards}

    def _import_catalogue(self) -> None:
        """Build the SQLite catalogue of the snapshot's Parquet parts, in one move."""
        for old in self.folder.glob("catalogue*"):
            # of a process that was killed
            shutil.rmtree(old)
        scratch = self.folder / f"catalogue.{token_hex(4)}"
        scratch.mkdir()
        try:
            names = ("fingerprint", "dtype", "parts", "template_version", "namespace", "model")
            catalogue = Catalogue(scratch, False, {name: getattr(self.manifest, name) for name in names})
            with catalogue.transaction() as connection:
                numbers = {
                    entry.name: enter_shard(
                        connection, entry.file_name, entry.nbytes, bytes.fromhex(entry.header_checksum), 0
                    )
                    for entry in self.manifest.shards
                }
            for part in self.manifest.catalogue:
                content = self.source.read(part.name)
                if hashlib.sha256(content).hexdigest() != part.sha256:
                    raise ValueError(f"{self.source.url}/{part.name} has another SHA-256 than its manifest says.")
                _import_part(catalogue, content, numbers, f"{self.source.url}/{part.name}")
            catalogue.close()
            os.replace(scratch, self.folder / "catalogue")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def open_shard(
        self, name: str, nbytes: int, header_checksum: bytes, fetched: Callable[[int], None]
    ) -> MappedShard:
        """A shard where it lies, or its local copy that fills with what is read; `fetched` is told bytes."""
        entry = self._entries[name]
        if self.source.is_local:
            return MappedShard(Path(self.source.path(entry.name)), nbytes, header_checksum)
        return RemoteShard(self, entry, fetched)

    def cached_bytes(self) -> int:
        """Bytes of local copies on disk: holes count nothing."""
        return sum(status.st_blocks * 512 for _, status in self._copies())

    def _copies(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.ranges.iterdir():
            try:
                found.append((path, path.stat()))
            except FileNotFoundError:
                continue
        return found

    def shrink(self, keep: Path) -> None:
        """Delete copies, the least recently opened first, until the bound holds; caches keep what they have mapped.

        Args:
            keep: is being read, and stays whatever its size.
        """
        total = self.cached_bytes()
        for path, status in sorted(self._copies(), key=lambda item: item[1].st_mtime_ns):
            if total > self.cache_bytes and path != keep:
                path.unlink(missing_ok=True)
                total -= status.st_blocks * 512


class RemoteShard(MappedShard):
    """A shard elsewhere: its contexts are fetched by range into a sparse local file of the same layout.

    Nothing records which contexts are there: a context is there when its checksum says so.

    Raises:
        DamagedShardError: the remote file is gone, has another size or another header.
    """

    writable = True

    def __init__(self, snapshot: Snapshot, entry: FileEntry, fetched: Callable[[int], None]):
        self._snapshot, self._entry, self._fetched = snapshot, entry, fetched
        self._remote, path = snapshot.source.path(entry.name), snapshot.ranges / entry.file_name
        if not path.exists():
            self._create(path)
        # the file may be evicted and made anew under its name: writes must reach the one that is mapped
        super().__init__(path, entry.nbytes, bytes.fromhex(entry.header_checksum))
        os.utime(path)

    def _create(self, path: Path) -> None:
        fs = self._snapshot.source.fs
        try:
            head = fs.cat_file(self._remote, start=0, end=8)
            size = min(int.from_bytes(head, "little"), self._entry.nbytes)
            header = head + fs.cat_file(self._remote, start=8, end=8 + size)
        except FileNotFoundError as error:
            raise DamagedShardError(f"{self._remote} is gone.") from error
        if checksum([header]).hex() != self._entry.header_checksum:
            raise DamagedShardError(f"{self._remote} has an altered header.")
        self._fetched(len(header))
        with durable(path) as file:
            file.write(header)
            file.truncate(self._entry.nbytes)

    def check(self) -> None:
        """Look whether the local copy is there, whole; what is fetched is written to it, so its time says nothing."""
        self._status()

    def load(self, contexts: Sequence[tuple[int, int, bytes]]) -> None:
        """Fetch those of the contexts (start, tokens, checksum) that are not here, all at once."""
        absent = [(start, tokens) for start, tokens, expected in contexts if not self.verify(start, tokens, expected)]
        spans = merge_spans(span for start, tokens in absent for span in self.spans(start, tokens))
        if not spans:
            return
        starts, ends = zip(*spans, strict=True)
        fs = self._snapshot.source.fs
        try:
            parts = fs.cat_ranges([self._remote] * len(spans), list(starts), list(ends), on_error="raise")
        except FileNotFoundError:
            # what was not fetched fails its checksum and is reported by id
            return
        for begin, part in zip(starts, parts, strict=True):
            os.pwrite(self._file.fileno(), part, begin)
        self._fetched(sum(map(len, parts)))
        os.utime(self._file.fileno())
        self._snapshot.shrink(keep=self.path)


def merge_spans(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Byte ranges in order, those that touch joined, empty ones left out."""
    merged: list[list[int]] = []
    for begin, end in sorted(span for span in spans if span[0] < span[1]):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([begin, end])
    return [(begin, end) for begin, end in merged]


def _import_part(catalogue: Catalogue, content: bytes, shards: dict[str, int], where: str) -> None:
    """Enter the documents of a Parquet part and the states that they read.

    Raises:
        ValueError: it names shards or texts that are not there.
    """
    states, documents = [], []
    for row in pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist():
        text, passages = row["text"], []
        for at in row["passages"]:
            inside = 0 <= at["start"] <= at["stop"] <= len(text) and min(at["first"], at["tokens"]) >= 0
            if at["shard"] not in shards or not inside:
                raise ValueError(f"{where} has a passage of {row['id']!r:.80} that is nowhere: {at!r:.200}.")
            new = NewState(*(at[name] for name in ("content", "first", "tokens", "nbytes", "checksum")))
            states.append((shards[at["shard"]], new))
            own = text[at["start"] : at["stop"]]
            passages.append(NewPassage(at["start"], at["stop"], own, index_text(own), at["content"]))
        # refused here rather than by a search
        metadata = json.dumps(json.loads(row["metadata"]), ensure_ascii=False)
        documents.append(NewDocument(row["id"], text, row["digest"], metadata, FOREVER, passages))
    with catalogue.transaction() as connection:
        enter_states(connection, states)
        for document in documents:
            enter_document(connection, document)
