"""Snapshots served where they are: the catalogue is brought here, and of the shards what is read, by range."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from secrets import token_hex

import numpy
import pyarrow.parquet

from xcllama.durable import durable, locked

from .catalogue import (
    CATALOGUE_NAME,
    FOREVER,
    Catalogue,
    Location,
    NewDocument,
    NewPassage,
    NewState,
    enter_document,
    enter_shard,
    enter_states,
)
from .manifest import FileEntry, Folder, resolve
from .search import index_text
from .shards import HEADER_BYTES, DamagedShardError, MappedShard, checksum, fits, parse_header, spans_of

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
            for partial in self.ranges.glob(".*.partial"):
                # of a process that was killed, unless it is at work: its bytes are fetched again then
                partial.unlink(missing_ok=True)
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
            names = ("fingerprint", "kind", "dtype", "template_version", "namespace", "model")
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

    def open_shard(self, name: str, nbytes: int, header_checksum: bytes, fetched: Callable[[int], None]):
        """A shard where it lies, mapped or fetched by range; `fetched` is told bytes."""
        entry = self._entries[name]
        if self.source.is_local:
            return MappedShard(Path(self.source.path(entry.name)), nbytes, header_checksum)
        return RemoteShard(self, entry, header_checksum, fetched)

    def read(self, remote: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Byte ranges of a remote file, all at once.

        Raises:
            DamagedShardError: it is gone, or shorter.
        """
        starts, stops = zip(*spans, strict=True)
        try:
            parts = self.source.fs.cat_ranges([remote] * len(spans), list(starts), list(stops), on_error="raise")
        except FileNotFoundError as error:
            raise DamagedShardError(f"{remote} is gone.") from error
        if any(len(part) != stop - start for part, (start, stop) in zip(parts, spans, strict=True)):
            raise DamagedShardError(f"{remote} is shorter than the manifest says.")
        return parts

    def kept(self, digest: bytes) -> bytes | None:
        """What was fetched before, by its checksum; it is the newest then."""
        path = self.ranges / digest.hex()
        try:
            os.utime(path)
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        return content if checksum([content]) == digest else None

    def keep(self, contents: Mapping[bytes, bytes]) -> None:
        """Keep what was fetched by its checksum, and let the least recently used go until the bound holds."""
        for digest, content in contents.items():
            with durable(self.ranges / digest.hex()) as file:
                file.write(content)
        files = sorted(self._files(), key=lambda item: item[1].st_mtime_ns)
        total = sum(status.st_blocks * 512 for _, status in files)
        for path, status in files:
            if total > self.cache_bytes:
                path.unlink(missing_ok=True)
                total -= status.st_blocks * 512

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.ranges.iterdir():
            try:
                found.append((path, path.stat()))
            except FileNotFoundError:
                continue
        return found


class RemoteShard:
    """A shard elsewhere: its contexts are fetched by range and kept here, each in a file named by its checksum.

    Raises:
        DamagedShardError: the remote file is gone, or has another header.
    """

    is_deleted = False

    def __init__(self, snapshot: Snapshot, entry: FileEntry, header_checksum: bytes, fetched: Callable[[int], None]):
        self.path, self._snapshot, self._fetched = snapshot.source.path(entry.name), snapshot, fetched
        header = snapshot.kept(header_checksum)
        if header is None:
            (head,) = snapshot.read(self.path, [(0, 8)])
            size = int.from_bytes(head, "little")
            if size > min(HEADER_BYTES, entry.nbytes):
                raise DamagedShardError(f"{self.path} has no header of a shard.")
            header = head + snapshot.read(self.path, [(8, 8 + size)])[0]
            if checksum([header]) != header_checksum:
                raise DamagedShardError(f"{self.path} has an altered header.")
            snapshot.keep({header_checksum: header})
            fetched(len(header))
        self.parts = parse_header(header, entry.nbytes)

    def check(self) -> None:
        """Nothing: what is read is compared with its checksum every time."""

    def fetch(self, places: Sequence[Location]) -> dict[Location, dict[str, numpy.ndarray]]:
        """The rows of each part of contexts, of those that are as their checksums say."""
        found = {place: self._snapshot.kept(place.checksum) for place in places}
        absent = [place for place, content in found.items() if content is None and fits(self.parts, place)]
        spans = {place: spans_of(self.parts, place) for place in absent}
        merged = merge_spans(span for own in spans.values() for span in own)
        if merged:
            pieces = dict(zip(merged, self._snapshot.read(self.path, merged), strict=True))
            self._fetched(sum(map(len, pieces.values())))
            contents = {place: b"".join(_part(pieces, *span) for span in own) for place, own in spans.items()}
            intact = {place: content for place, content in contents.items() if checksum([content]) == place.checksum}
            self._snapshot.keep({place.checksum: content for place, content in intact.items()})
            found |= intact
        return {place: self._rows(place, content) for place, content in found.items() if content is not None}

    def _rows(self, place: Location, content: bytes) -> dict[str, numpy.ndarray]:
        rows, start = {}, 0
        # writable: torch warns about buffers that are not
        raw = numpy.frombuffer(bytearray(content), numpy.uint8)
        for name, part in self.parts.items():
            stop = start + place.tokens * part.token_bytes
            rows[name] = raw[start:stop].reshape(place.tokens, part.token_bytes)
            start = stop
        return rows


def _part(pieces: Mapping[tuple[int, int], bytes], start: int, stop: int) -> bytes:
    """The bytes of a range out of the larger ones that were fetched."""
    if start == stop:
        return b""
    (first, _), piece = next(item for item in pieces.items() if item[0][0] <= start and stop <= item[0][1])
    return piece[start - first : stop - first]


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
