"""ContextStore: a corpus encoded once, searched and served to many requests."""

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Sequence
from itertools import islice, repeat
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

from modeling_xcllama.context_cache import ContextCache

from . import eviction
from .catalogue import FOREVER, Catalogue
from .encoding import convert, encode, groups, tokenize
from .handles import Handle
from .manifest import Manifest
from .opening import check_opener, namespace_folder, new_meta, opens_read_only
from .pending import AddReport, PendingShard, VerifyReport, split_documents, zip_documents
from .readable import ReadableStore
from .reading import MissingDocumentError, View
from .shards import HEADER_BYTES, MappedShard, write_shard
from .snapshot import write_snapshot

DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
SHARD_BYTES, DOCUMENTS_AT_ONCE = 64 << 20, 64
# seconds of encoding that a crash may lose: shards of slow machines are written before they are full
UNWRITTEN_SECONDS = 60.0
USES_KEPT = 10_000


class ContextStore(ReadableStore):
    """A namespace of encoded documents in a folder; threads and processes may share it.

    Args:
        path: the store's folder, made if needed.
        model, processor: what encodes; without them the store only serves what it has.
        namespace: part of the path of everything: no call sees another namespace.
        dtype: of the states at rest: "auto" (the model's), "float32", "bfloat16", "float16", "int8" or "int4".
        max_bytes: most bytes of shard files; None: as the store was made (unbounded at first).
        shard_bytes: size of a full shard.
        read_only: True, False, or None: read-only where the folder cannot be written.
        fingerprint: of the states, where no model is at hand to make a new store.

    Raises:
        ValueError: a store of another model, template, dtype or format, or arguments that do not fit.
        FileNotFoundError: a read-only store that is not there.
    """

    def __init__(
        self,
        path: str | Path,
        model=None,
        processor=None,
        namespace: str = "default",
        *,
        dtype: str = "auto",
        max_bytes: int | None = None,
        shard_bytes: int = SHARD_BYTES,
        read_only: bool | None = None,
        fingerprint: str | None = None,
    ):
        if (model is None) != (processor is None):
            raise ValueError("give both `model` and `processor`, or neither: texts are encoded by the two together.")
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"`dtype` must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}.")
        if max_bytes is not None and max_bytes <= 0 or shard_bytes <= 0:
            raise ValueError(f"`max_bytes` and `shard_bytes` must be positive, got {max_bytes} and {shard_bytes}.")
        self.path, self.namespace = Path(path), namespace
        self.folder = namespace_folder(path, namespace)
        self.model, self.processor = model, processor
        self.fingerprint = fingerprint if model is None else model.model.context_fingerprint()
        self.read_only = opens_read_only(self.folder, read_only)
        made = None if self.read_only else new_meta(self.folder, namespace, self.fingerprint, dtype, model, processor)
        super().__init__(Catalogue(self.folder, self.read_only, made), namespace, str(self.folder))
        template = None if processor is None else str(processor.template_version)
        check_opener(self.catalogue.meta, self.folder, self.fingerprint, template, namespace, dtype)
        self.fingerprint = self.catalogue.meta["fingerprint"]
        self._limit_bytes(max_bytes, shard_bytes)
        self._used: dict[int, float] = {}
        if not self.read_only:
            eviction.clean(self.catalogue, self.folder)

    @classmethod
    def open(cls, path: str | Path, model=None, processor=None, namespace: str = "default", **options):
        """Open a snapshot (folder, fsspec URL or "hf://" id) read-only, or a store's folder.

        Args:
            options: of `SnapshotStore` for a snapshot, of `ContextStore` for a store.
        """
        from .snapshot_store import SnapshotStore, is_snapshot

        if is_snapshot(path):
            return SnapshotStore(path, model, processor, **options)
        return cls(path, model, processor, namespace, **options)

    def _limit_bytes(self, max_bytes: int | None, shard_bytes: int) -> None:
        stored = self.catalogue.meta["max_bytes"]
        self.max_bytes = max_bytes or (int(stored) if stored else None)
        if not self.read_only and self.max_bytes is not None and str(self.max_bytes) != stored:
            self.catalogue.set_meta("max_bytes", str(self.max_bytes))
        self.shard_bytes = shard_bytes if self.max_bytes is None else min(shard_bytes, max(self.max_bytes // 8, 1))

    def _open_shard(self, name: str, nbytes: int, header_checksum: bytes) -> MappedShard:
        return MappedShard(self.folder / "shards" / name, nbytes, header_checksum)

    def __enter__(self) -> "ContextStore":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Write down what was used last and close the catalogue; views that `get` gave stay valid."""
        self._flush_uses()
        self.catalogue.close()

    # writing

    def add(
        self,
        ids: str | Iterable[str],
        texts: str | Iterable[str],
        metadata: dict | Iterable[dict | None] | None = None,
        *,
        ttl: float | None = None,
        progress: bool | None = None,
    ) -> AddReport:
        """Encode the documents that are new or changed; on return all of them are on disk.

        Args:
            ids: any Unicode; of the same id twice in a call the later text counts.
            texts: one a document, streamed: a corpus of any size can be a generator.
            metadata: JSON values one a document, found again by `search(where=...)`.
            ttl: seconds after which the documents are gone; None: never.
            progress: show a progress bar; None: on a terminal.

        Raises:
            ValueError: no model, counts that differ, or a document that cannot be encoded.
            OSError: the disk is full; what an earlier call added is untouched.
        """
        self.catalogue.check_writable()
        if self.model is None:
            raise ValueError("this store was opened without `model` and `processor`: it cannot encode.")
        ids, texts = ([ids] if isinstance(ids, str) else ids), ([texts] if isinstance(texts, str) else texts)
        metadata = [metadata] if isinstance(metadata, dict) else metadata
        rows, count = zip_documents(ids, texts, metadata), len(ids) if hasattr(ids, "__len__") else None
        report, pending = AddReport(), PendingShard()
        expires = FOREVER if ttl is None else time.time() + ttl
        with tqdm(total=count, unit="doc", disable=None if progress is None else not progress) as bar:
            while chunk := list(islice(rows, DOCUMENTS_AT_ONCE)):
                self._add_chunk({row[0]: row for row in chunk}, expires, report, pending)
                bar.update(len(chunk))
        self._write(pending)
        return report

    def _add_chunk(self, rows: dict[str, tuple], expires: float, report: AddReport, pending: PendingShard) -> None:
        if not pending.ids.isdisjoint(rows):
            self._write(pending)
        hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text, _ in rows.values()}
        known = self.catalogue.known(list(rows))
        same = {name for name in rows if name in known and known[name][:2] == (hashes[name], 0)}
        self._update_unchanged({name: (rows[name][2], *known[name][2:]) for name in same}, expires)
        report.skipped += len(same)
        self.metrics.add(documents_skipped=len(same))
        todo = [row for row in rows.values() if row[0] not in same]
        if not todo:
            return
        begin = perf_counter()
        names = [row[0] for row in todo]
        sequences = tokenize(self.processor, names, [row[1] for row in todo])
        for group in groups([len(sequence) for sequence in sequences]):
            with self.metrics.timed("encode"):
                cache = encode(self.model, [sequences[index] for index in group])
            self._queue(pending, [todo[i] for i in group], [hashes[names[i]] for i in group], cache, expires)
            report.encoded += len(group)
            report.tokens += cache.offsets[-1]
            self.metrics.add(documents_encoded=len(group), tokens_encoded=cache.offsets[-1])
            if perf_counter() - pending.begun > UNWRITTEN_SECONDS:
                self._write(pending)
        report.seconds += perf_counter() - begin

    def _update_unchanged(self, rows: dict[str, tuple[dict | None, str, float]], expires: float) -> None:
        """Take over new metadata and a new time to live of documents (given, stored metadata, stored expiry)."""
        changes = []
        for name, (given, stored, until) in rows.items():
            metadata = stored if given is None else json.dumps(given, ensure_ascii=False)
            if (metadata, expires) != (stored, until):
                changes.append((name, metadata, expires))
        if changes:
            self.catalogue.update(changes)

    def add_cache(
        self,
        ids: Sequence[str],
        texts: Sequence[str],
        cache: ContextCache,
        metadata: Sequence[dict | None] | None = None,
        *,
        ttl: float | None = None,
    ) -> None:
        """Add documents whose states were encoded elsewhere; row i of `cache` is document i, whole.

        Raises:
            ValueError: another fingerprint, or counts that differ.
        """
        if cache.fingerprint != self.fingerprint:
            raise ValueError(
                f"these states have the fingerprint {cache.fingerprint}, the store's is {self.fingerprint}; "
                "encode them with the store's model."
            )
        cache = cache.to("cpu")
        rows = list(zip_documents(ids, texts, metadata))
        if cache.rows != tuple((number,) for number in range(len(rows))) or len(cache.offsets) != len(rows) + 1:
            raise ValueError(f"`cache` must have one row a document ({len(rows)}), got {cache.rows!r:.80}.")
        if len({row[0] for row in rows}) < len(rows):
            raise ValueError("`ids` of precomputed states must be distinct.")
        hashes = [hashlib.sha256(row[1].encode()).hexdigest() for row in rows]
        pending = PendingShard()
        self._queue(pending, rows, hashes, cache, FOREVER if ttl is None else time.time() + ttl)
        self._write(pending)

    def _queue(self, pending: PendingShard, rows: list[tuple], hashes: list[str], cache, expires: float) -> None:
        """Put documents into the shard to come; write it when it is full."""
        if not self.dtype:
            self.catalogue.set_meta("dtype", str(cache.dtype).removeprefix("torch."))
        for document, parts in split_documents(rows, hashes, convert(cache, self.dtype), expires):
            if pending.rows and pending.nbytes + document.nbytes > self.shard_bytes:
                self._write(pending)
            pending.append(document, parts)

    def _write(self, pending: PendingShard) -> None:
        """Write the waiting documents to a shard and enter them into the catalogue: from then on they are served."""
        self.catalogue.check_writable()
        if not pending.rows:
            return
        name = eviction.new_shard_name()
        path = self.folder / "shards" / name
        with self.metrics.timed("write"):
            if self.max_bytes is not None:
                self._make_room(pending.nbytes + HEADER_BYTES, name)
            with eviction.writing(self.folder):
                try:
                    nbytes, header_checksum = write_shard(path, pending.parts(), self.fingerprint)
                    replaced = self.catalogue.commit(name, nbytes, header_checksum, pending.rows)
                except BaseException:
                    if self.catalogue.abandon(name):
                        path.unlink(missing_ok=True)
                    raise
            if replaced:
                eviction.drop_dead_shards(self.catalogue, self.folder)
        self.metrics.add(bytes_written=nbytes)
        pending.clear()

    # bounds

    def _make_room(self, needed: int, name: str | None = None) -> int:
        self._flush_uses()
        # a shard's size is kept free for rewriting one
        limit = self.max_bytes - self.shard_bytes
        count = eviction.make_room(self.catalogue, self.folder, needed, limit, name)
        self.metrics.add(evictions=count)
        return count

    def _flush_uses(self) -> None:
        used, self._used = self._used, {}
        if used and not self.read_only:
            self.catalogue.touch(used)

    def _note_use(self, views: list[View]) -> None:
        if not self.read_only:
            self._used.update(zip([view.document for view in views], repeat(time.time())))
            if len(self._used) > USES_KEPT:
                self._flush_uses()

    def pin(self, ids: str | Sequence[str], ttl: float | None = None) -> Handle:
        """Keep documents from being evicted until the handle is released or `ttl` seconds have passed.

        Raises:
            MissingDocumentError: a document that is not there; none is pinned then.
        """
        ids = [ids] if isinstance(ids, str) else list(ids)
        token, expires = secrets.token_hex(12), FOREVER if ttl is None else time.time() + ttl
        if missing := self.catalogue.pin(token, ids, expires):
            raise MissingDocumentError(missing, str(self.folder))
        return Handle(self, ids, token, expires)

    def release(self, token: str) -> None:
        """Release a handle by its token."""
        self.catalogue.unpin(token)

    def evict(self, ids: str | Sequence[str] | None = None, max_bytes: int | None = None) -> int:
        """Remove documents: `ids`, or the least recently used ones until shards hold at most `max_bytes`.

        Without arguments those whose time to live is over go, and the bound of the store is enforced.

        Returns:
            Documents removed.

        Raises:
            MissingDocumentError: an id that is not there.
            ValueError: pinned documents.
        """
        if ids is not None:
            return self._evict_ids([ids] if isinstance(ids, str) else list(ids))
        count = eviction.remove_expired(self.catalogue)
        limit = max_bytes if max_bytes is not None else self.max_bytes
        if limit is None:
            eviction.drop_dead_shards(self.catalogue, self.folder)
        else:
            self._flush_uses()
            count += eviction.make_room(self.catalogue, self.folder, 0, limit)
        self.metrics.add(evictions=count)
        return count

    def _evict_ids(self, ids: list[str]) -> int:
        known = self.catalogue.known(ids)
        if missing := [name for name in ids if name not in known]:
            raise MissingDocumentError(missing, str(self.folder))
        if pinned := self.catalogue.pinned(ids):
            raise ValueError(f"pinned documents cannot be evicted: {', '.join(map(repr, pinned[:8]))}; release them.")
        with self.catalogue.transaction() as connection:
            self.catalogue.remove(connection, list(known), self.catalogue.next_version(connection))
        eviction.drop_dead_shards(self.catalogue, self.folder)
        self.metrics.add(evictions=len(known))
        return len(known)

    def compact(self) -> int:
        """Join small shards and drop what dead documents hold; returns the bytes of shards won back."""
        self.catalogue.check_writable()
        return eviction.compact(self.catalogue, self.folder, self.shard_bytes)

    # damage

    def verify(self, repair: bool = False) -> VerifyReport:
        """Read every document; those whose states are damaged are marked, and with `repair` encoded again."""
        report = self._verify()
        self.catalogue.mark_damaged(report.damaged) if not self.read_only else None
        if repair and report.damaged:
            report.repaired = self.repair(report.damaged)
        return report

    def repair(self, ids: Sequence[str] | None = None) -> list[str]:
        """Encode documents again from the text in the catalogue; default: those found damaged.

        Raises:
            ValueError: no model.
            MissingDocumentError: an id that is not there.
        """
        ids = self.catalogue.damaged() if ids is None else list(ids)
        if ids:
            self.catalogue.mark_damaged(ids)
        for name in ids:
            entry = self.catalogue.text(name)
            if entry is None:
                raise MissingDocumentError([name], str(self.folder))
            text, metadata, expires = entry
            self.add(name, text, metadata, ttl=None if expires == FOREVER else expires - time.time(), progress=False)
        return ids

    def snapshot(self, url: str | Path, **options) -> Manifest:
        """Publish the namespace as a snapshot; see `context_store.snapshot.write_snapshot`."""
        return write_snapshot(self.catalogue, self.folder / "shards", url, **options)
