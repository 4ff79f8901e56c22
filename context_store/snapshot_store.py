"""SnapshotStore: a snapshot anywhere, served read-only; its catalogue and what is read of its shards is kept here."""

import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet

from .catalogue import Catalogue, NewDocument
from .counters import Metrics
from .eviction import evicting
from .manifest import MANIFEST_NAME, Folder, ShardEntry
from .readable import ReadableStore
from .reading import View
from .schema import CATALOGUE_NAME
from .shards import DamagedShardError, MappedShard, checksum
from .snapshot import read_manifest

CACHE_BYTES = 8 << 30


def is_snapshot(path: str | Path) -> bool:
    """Whether `path` is a URL, or a folder with a manifest."""
    return "://" in str(path) or (Path(path) / MANIFEST_NAME).is_file()


def default_cache_folder() -> Path:
    """Where snapshots are kept: `$XCLLAMA_CACHE` or ~/.cache/xcllama, in snapshots/."""
    return Path(os.environ.get("XCLLAMA_CACHE") or Path.home() / ".cache" / "xcllama") / "snapshots"


class RangeCache:
    """Sparse local copies of remote shards, at most `max_bytes` on disk; the least recently opened go first.

    Args:
        folder: of the copies.
        max_bytes: a copy that is being read stays, whatever its size.
        close_deleted: called when copies were deleted; files that stay open hold their room on the disk.
    """

    def __init__(self, folder: Path, max_bytes: int, close_deleted: Callable[[], None]):
        self.folder, self.max_bytes, self._close_deleted = folder, max_bytes, close_deleted
        folder.mkdir(parents=True, exist_ok=True)

    def size(self) -> int:
        """Bytes on disk: holes count nothing."""
        return sum(status.st_blocks * 512 for _, status in self._files())

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.folder.iterdir():
            try:
                found.append((path, path.stat()))
            except FileNotFoundError:
                continue
        return found

    def shrink(self, keep: Path) -> None:
        """Delete files until the bound holds; caches that were handed out keep what they have mapped."""
        files = sorted(self._files(), key=lambda item: item[1].st_mtime_ns)
        total = sum(status.st_blocks * 512 for _, status in files)
        for path, status in files:
            if total > self.max_bytes and path != keep:
                path.unlink(missing_ok=True)
                total -= status.st_blocks * 512
        self._close_deleted()


class RemoteShard(MappedShard):
    """A shard elsewhere: its documents are fetched by range into a sparse local file of the same layout.

    Nothing records which documents are there: a document is there when its checksum says so.

    Raises:
        DamagedShardError: the remote file is gone, has another size or another header.
    """

    writable = True

    def __init__(self, folder: Folder, entry: ShardEntry, cache: RangeCache, metrics: Metrics):
        self._folder, self._entry, self._cache, self._metrics = folder, entry, cache, metrics
        path = cache.folder / Path(entry.name).name
        if not path.exists():
            self._create(path)
        # the file may be evicted and made anew under its name: writes must reach the one that is mapped
        super().__init__(path, entry.nbytes, bytes.fromhex(entry.header_checksum))
        os.utime(path)

    def _create(self, path: Path) -> None:
        remote = self._folder.path(self._entry.name)
        try:
            head = self._folder.fs.cat_file(remote, start=0, end=8)
            header = head + self._folder.fs.cat_file(remote, start=8, end=8 + int.from_bytes(head, "little"))
        except FileNotFoundError as error:
            raise DamagedShardError(f"{remote} is gone.") from error
        if checksum([header]).hex() != self._entry.header_checksum:
            raise DamagedShardError(f"{remote} has an altered header.")
        self._metrics.add(bytes_fetched=len(header))
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        with open(partial, "wb") as file:
            file.write(header)
            file.truncate(self._entry.nbytes)
        os.replace(partial, path)

    def check(self) -> None:
        """Look whether the local copy is there, whole; what is fetched is written to it, so its time says nothing."""
        self._status()

    def load(self, documents: Sequence[tuple[int, int, bytes]]) -> None:
        """Fetch those of the documents (start, tokens, checksum) that are not here, all at once."""
        absent = [(start, tokens) for start, tokens, expected in documents if not self.verify(start, tokens, expected)]
        spans = merge_spans(span for start, tokens in absent for span in self.spans(start, tokens))
        if not spans:
            return
        remote = self._folder.path(self._entry.name)
        starts, ends = zip(*spans, strict=True)
        try:
            parts = self._folder.fs.cat_ranges([remote] * len(spans), list(starts), list(ends), on_error="raise")
        except FileNotFoundError:
            # what was not fetched fails its checksum and is reported by id
            return
        for begin, part in zip(starts, parts, strict=True):
            os.pwrite(self._file.fileno(), part, begin)
        self._metrics.add(bytes_fetched=sum(map(len, parts)))
        os.utime(self.path) if self.path.exists() else None
        self._cache.shrink(keep=self.path)


def merge_spans(spans) -> list[tuple[int, int]]:
    """Byte ranges in order, those that touch joined, empty ones left out."""
    merged: list[list[int]] = []
    for begin, end in sorted(spans):
        if begin == end:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([begin, end])
    return [(begin, end) for begin, end in merged]


class SnapshotStore(ReadableStore):
    """A snapshot served read-only from any number of hosts; `ContextStore.open` makes one.

    Args:
        url: local folder or fsspec URL.
        model, processor: whose fingerprint and template version must be the snapshot's; None: not compared.
        cache_folder: for the catalogue and what is fetched of shards; None: `default_cache_folder()`.
        cache_bytes: most bytes of fetched shards on this host.
        storage_options: of the file system.

    Raises:
        ValueError: no snapshot, one of another model or template, or an altered catalogue.
    """

    def __init__(
        self,
        url: str | Path,
        model=None,
        processor=None,
        *,
        cache_folder: str | Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        storage_options: dict | None = None,
    ):
        self.source = Folder(url, storage_options)
        self.manifest = read_manifest(self.source)
        self.model, self.processor = model, processor
        self._check_manifest()
        digest = hashlib.sha256(self.manifest.to_json().encode()).hexdigest()[:24]
        self.folder = Path(cache_folder or default_cache_folder()) / digest
        self.folder.mkdir(parents=True, exist_ok=True)
        with evicting(self.folder):
            if not (self.folder / "catalogue" / CATALOGUE_NAME).is_file():
                self._import_catalogue()
        self._entries = {Path(entry.name).name: entry for entry in self.manifest.shards}
        super().__init__(Catalogue(self.folder / "catalogue", True), self.manifest.namespace, self.source.url)
        self.cache = RangeCache(self.folder / "ranges", cache_bytes, self._reader.close_deleted)

    def _check_manifest(self) -> None:
        if self.model is not None and self.model.model.context_fingerprint() != self.manifest.fingerprint:
            raise ValueError(
                f"{self.source.url} holds states of another model, template or version of the weights: its "
                f"fingerprint is {self.manifest.fingerprint}, the model's {self.model.model.context_fingerprint()}."
            )
        template = None if self.processor is None else str(self.processor.template_version)
        if template is not None and self.manifest.template_version not in ("", template):
            raise ValueError(
                f"{self.source.url} was made with template version {self.manifest.template_version!r}, the processor "
                f"has {template!r}."
            )

    def _import_catalogue(self) -> None:
        """Build the SQLite catalogue of the snapshot's Parquet parts, in one move."""
        scratch = self.folder / f"catalogue.{secrets.token_hex(4)}.partial"
        scratch.mkdir()
        try:
            fields = ("fingerprint", "dtype", "template_version", "namespace")
            meta = {name: getattr(self.manifest, name) for name in fields} | {"max_bytes": "", "shard_bytes": ""}
            catalogue = Catalogue(scratch, False, meta)
            shards = {entry.name: entry for entry in self.manifest.shards}
            for part in self.manifest.catalogue:
                content = self.source.read(part.name)
                if hashlib.sha256(content).hexdigest() != part.sha256:
                    raise ValueError(f"{self.source.url}/{part.name} has another SHA-256 than its manifest says.")
                _import_part(catalogue, content, shards)
            catalogue.close()
            shutil.rmtree(self.folder / "catalogue", ignore_errors=True)
            os.replace(scratch, self.folder / "catalogue")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _open_shard(self, name: str, nbytes: int, header_checksum: bytes) -> MappedShard:
        entry = self._entries[name]
        if self.source.is_local:
            return MappedShard(Path(self.source.path(entry.name)), nbytes, header_checksum)
        return RemoteShard(self.source, entry, self.cache, self.metrics)

    def _note_use(self, views: list[View]) -> None:
        """Nothing: whole shards go, by when they were opened."""

    def __enter__(self) -> "SnapshotStore":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close the catalogue; views that `get` gave stay valid."""
        self.catalogue.close()

    def verify(self):
        """Read every document, fetching what is not here, and name the damaged ones."""
        return self._verify()


def _import_part(catalogue: Catalogue, content: bytes, shards: dict[str, ShardEntry]) -> None:
    groups: dict[str, list[NewDocument]] = {}
    for row in pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist():
        shard = row.pop("shard")
        row["metadata"] = json.loads(row["metadata"])
        groups.setdefault(shard, []).append(NewDocument(**row))
    for name, documents in groups.items():
        entry = shards[name]
        catalogue.commit(Path(name).name, entry.nbytes, bytes.fromhex(entry.header_checksum), documents)
