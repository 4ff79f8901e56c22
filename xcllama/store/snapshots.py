"""Snapshots are published from a store, and copied."""

import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from xcllama.durable import durable, locked
from xcllama.progress import tracked

from .catalogue import Catalogue, Location
from .manifest import (
    FILE_NAMES,
    MANIFEST_NAME,
    PASSAGE,
    FileEntry,
    Folder,
    Manifest,
    render_card,
    resolve,
    sha256_of,
    write_part,
)
from .shards import DamagedShardError, MappedShard, dtype_of, write_shard

ROWS_PER_PART = 4096
DAMAGED = (
    "SELECT DISTINCT id FROM documents JOIN passages USING (document) JOIN states USING (state) WHERE damaged LIMIT 8"
)
SHARDS = "SELECT shard, name, nbytes, header_checksum, state_bytes FROM shards WHERE live ORDER BY shard"
STATES = (
    "SELECT 0, state, shard, start, tokens, checksum FROM states WHERE shard = ? AND EXISTS (SELECT 1 FROM passages "
    "JOIN documents USING (document) WHERE passages.state = states.state AND expires > ?) ORDER BY start"
)
DOCUMENTS = (
    "SELECT document, id, text, metadata, digest FROM documents JOIN texts USING (document) "
    "WHERE expires > ? AND document > ? ORDER BY document LIMIT ?"
)
PASSAGES = (
    "SELECT passages.start, stop, content, state, nbytes, checksum FROM passages JOIN states USING (state) "
    "WHERE document = ? ORDER BY position"
)


def write_snapshot(
    store: Path, url: str | Path, *, overwrite: bool = False, storage_options: dict | None = None, **card: str
) -> Manifest:
    """Publish the live documents of a namespace.

    Args:
        store: folder of the namespace.
        url: local path or fsspec URL.
        overwrite: replace a snapshot that is there.
        card: `title` and `license_id`.

    Raises:
        ValueError: damaged documents, a snapshot that is there, or a shard that went away meanwhile.
    """
    folder, catalogue = Folder(url, storage_options), Catalogue(store, read_only=True)
    if folder.exists(MANIFEST_NAME) and not overwrite:
        raise ValueError(f"there is a snapshot at {folder.url}; pass `overwrite=True` to replace it.")
    # one view of the catalogue, whatever is added meanwhile
    catalogue.rows("BEGIN")
    try:
        if damaged := catalogue.rows(DAMAGED):
            names = ", ".join(repr(row[0]) for row in damaged)
            raise ValueError(f"damaged documents are not published: {names}; repair them.")
        if not catalogue.rows("SELECT 1 FROM states LIMIT 1"):
            raise ValueError(f"{store} holds no documents: there is nothing to publish.")
        places, shards = _upload_shards(catalogue, store / "shards", folder)
        parts, documents = [], 0
        for rows in _document_rows(catalogue, places):
            parts.append(write_part(folder, rows))
            documents += len(rows)
        meta = catalogue.meta
    finally:
        catalogue.close()
    described = {name: meta[name] for name in ("fingerprint", "template_version", "namespace")}
    # of a folder on this machine only the name
    described["model"] = Path(meta["model"]).name if Path(meta["model"]).is_absolute() else meta["model"]
    tokens = sum(place[2] for place in places.values())
    counts = {"documents": documents, "tokens": tokens, "kind": meta["kind"], "dtype": dtype_of(meta["kind"])}
    manifest = Manifest(**described, **counts, shards=shards, catalogue=parts)
    return folder.commit(manifest, render_card(manifest, folder.url, **card))


def _upload_shards(catalogue: Catalogue, source: Path, folder: Folder) -> tuple[dict, list[FileEntry]]:
    """Copy what is alive of each shard; returns (shard, first token, tokens) by state, and the files."""
    places: dict[int, tuple[str, int, int]] = {}
    entries = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, file_name, nbytes, header, state_bytes in tracked(catalogue.rows(SHARDS), "shards"):
            states = list(map(Location._make, catalogue.rows(STATES, (number, time.time()))))
            if not states:
                continue
            path, name = source / file_name, f"shards/{file_name}"
            contexts = _checked_contexts(path, nbytes, header, states)
            if sum(part.nbytes for context in contexts for part in context.values()) < state_bytes:
                path = Path(scratch, file_name)
                _, header = write_shard(path, contexts, catalogue.meta["fingerprint"])
                # an older snapshot may have more of this shard, under its own name
                name = f"shards/{sha256_of(path)[:24]}.safetensors"
                starts = accumulate((state.tokens for state in states), initial=0)
                states = [state._replace(start=start) for state, start in zip(states, starts, strict=False)]
            places |= {state.state: (name, state.start, state.tokens) for state in states}
            entries.append(FileEntry(name, path.stat().st_size, sha256_of(path), header.hex()))
            folder.upload(path, name)
    return places, entries


def _checked_contexts(path: Path, nbytes: int, header: bytes, states: Sequence[Location]) -> list[dict]:
    try:
        shard = MappedShard(path, nbytes, header)
    except DamagedShardError as error:
        raise ValueError(f"{error} Run `verify(repair=True)`, or try again if the store was changing.") from error
    if len(shard.fetch(states)) < len(states):
        raise ValueError(f"states in {path} are damaged; run `verify(repair=True)`.")
    return [shard.context(state) for state in states]


def _document_rows(catalogue: Catalogue, places: dict[int, tuple[str, int, int]]) -> Iterator[list[dict]]:
    """The documents as rows of a part, `ROWS_PER_PART` at a time."""
    names, now, last = [name for name, _ in PASSAGE], time.time(), 0
    while rows := catalogue.rows(DOCUMENTS, (now, last, ROWS_PER_PART)):
        last, found = rows[-1][0], []
        for number, *values in rows:
            row: dict = dict(zip(("id", "text", "metadata", "digest"), values, strict=True))
            row["passages"] = [
                dict(zip(names, (start, stop, content, *places[state], nbytes, checksum), strict=True))
                for start, stop, content, state, nbytes, checksum in catalogue.rows(PASSAGES, (number,))
            ]
            found.append(row)
        yield found


def pull(url: str | Path, folder: str | Path, storage_options: dict | None = None) -> Manifest:
    """Copy a snapshot to a local folder; what is there already and has the right SHA-256 is kept.

    Raises:
        ValueError: no snapshot, or a file whose SHA-256 is not what the manifest says.
    """
    source, target = Folder(resolve(url), storage_options), Path(folder)
    manifest = source.manifest()
    for kind in FILE_NAMES:
        (target / kind).mkdir(parents=True, exist_ok=True)
    with locked(target):
        for partial in target.rglob(".*.partial"):
            # of a process that was killed: another one would hold the lock
            partial.unlink()
        kept = {entry.name: entry.sha256 for entry in manifest.files}
        here = Folder(target)
        old = {entry.name: entry.sha256 for entry in here.manifest().files} if here.exists(MANIFEST_NAME) else {}
        if any(kept.get(name, digest) != digest for name, digest in old.items()):
            # a file that is replaced is none of the snapshot that was here
            (target / MANIFEST_NAME).unlink()
        for entry in tracked(manifest.files, "files"):
            path = target / entry.name
            if not (path.is_file() and path.stat().st_size == entry.nbytes and sha256_of(path) == entry.sha256):
                with durable(path) as file:
                    source.fs.get_file(source.path(entry.name), file.name)
                    if sha256_of(file.name) != entry.sha256:
                        raise ValueError(f"{source.url}/{entry.name} has another SHA-256 than its manifest says.")
        card = source.read("README.md") if source.exists("README.md") else render_card(manifest, source.url)
        here.commit(manifest, card)
        for kind, pattern in FILE_NAMES.items():
            for path in (target / kind).iterdir():
                # of a pull that was killed before it had removed what it replaced
                if (name := f"{kind}/{path.name}") not in kept and re.fullmatch(pattern, name, re.ASCII):
                    path.unlink()
        return manifest
