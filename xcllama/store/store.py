"""ContextStore: a corpus encoded once, searched and served to many requests."""

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from tqdm import tqdm

from modeling_xcllama.context_cache import ContextCache
from modeling_xcllama.passages import PASSAGE_TOKENS

from .adding import Adder, AddReport, Writer, checked_row, zip_rows
from .catalogue import FOREVER, Catalogue, NewDocument, NewPassage
from .counters import Counters, Metrics
from .encoding import DTYPES, content_digest, contexts_of, convert
from .manifest import Manifest, is_snapshot
from .opening import check_count, check_opener, expiry, namespace_folder, new_meta, opens_read_only
from .reading import MissingDocumentError, Reader, VerifyReport
from .remote import Snapshot
from .search import Hit, index_text, search
from .shards import DamagedShardError, MappedShard, describe, dtype_of
from .snapshots import write_snapshot
from .upkeep import Handle, Room

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 << 20
# shards of one call that are joined at its end
SMALL_SHARDS = 16


class ContextStore:
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
        passage_tokens: of the passages that documents are split into when they are added: at least, at most, and at
            most with the words that are repeated where a sentence had to be cut; None: a document is one passage.
        source: a snapshot to serve, read-only, instead of a folder; `open` gives it.

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
        passage_tokens: tuple[int, int, int] | None = PASSAGE_TOKENS,
        source: Snapshot | None = None,
    ):
        if (model is None) != (processor is None):
            raise ValueError("give both `model` and `processor`, or neither: texts are encoded by the two together.")
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"`dtype` must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.path, self.namespace, self._source = Path(path), namespace, source
        self.model, self.processor, self.passage_tokens = model, processor, passage_tokens
        self.folder = namespace_folder(path, namespace) if source is None else source.folder / "catalogue"
        self.fingerprint = fingerprint if model is None else model.model.context_fingerprint()
        self.read_only = source is not None or opens_read_only(self.folder, read_only)
        made = None if self.read_only else new_meta(self.folder, namespace, self.fingerprint, dtype, model, processor)
        self.catalogue = Catalogue(self.folder, self.read_only, made)
        template = None if processor is None else str(processor.template_version)
        where = str(self.folder) if source is None else source.source.url
        check_opener(self.catalogue.meta, where, self.fingerprint, template, namespace, dtype)
        self.fingerprint = self.catalogue.meta["fingerprint"]
        self.metrics = Metrics(namespace)
        self._reader = Reader(self.catalogue, self._open_shard, self.metrics, where)
        check_count("shard_bytes", shard_bytes)
        if max_bytes is not None:
            check_count("max_bytes", max_bytes)
        self._room = Room(self.catalogue, max_bytes, shard_bytes)
        if not self.read_only:
            self._room.clean()

    @property
    def max_bytes(self) -> int | None:
        """Most bytes of shard files; None: unbounded."""
        return self._room.max_bytes

    @classmethod
    def open(
        cls, path: str | Path, model=None, processor=None, namespace: str | None = None, **options
    ) -> "ContextStore":
        """Open what is there: a store's folder, or a snapshot, read-only.

        Args:
            path: folder, fsspec URL, or the id of a data set on the Hub ("org/name").
            options: of `Snapshot` for a snapshot (`revision`, `cache_folder`, ...), else of `ContextStore`.
        """
        if not is_snapshot(path):
            return cls(path, model, processor, namespace or "default", **options)
        source = Snapshot(path, **options)
        return cls(path, model, processor, namespace or source.manifest.namespace, source=source)

    def _open_shard(self, name: str, nbytes: int, header_checksum: bytes) -> MappedShard:
        if self._source is None:
            shard = MappedShard(self.folder / "shards" / name, nbytes, header_checksum)
        else:
            shard = self._source.open_shard(name, nbytes, header_checksum, self._count_fetched)
        if describe(shard.parts) != self.catalogue.meta.get("kind"):
            raise DamagedShardError(f"{shard.path} holds states of another kind than the catalogue says.")
        return shard

    def _count_fetched(self, nbytes: int) -> None:
        self.metrics.add(bytes_fetched=nbytes)

    def __enter__(self) -> "ContextStore":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Write down what was used last and close the catalogue; views that `get` gave stay valid."""
        try:
            self._room.flush()
        except OSError as error:
            logger.warning(f"when documents were last used is not kept: {error}")
        self.catalogue.close()

    @property
    def dtype(self) -> str:
        """Dtype of the states at rest; "auto" before the first document of a store made without a model."""
        meta = self.catalogue.meta
        return dtype_of(meta["kind"]) if "kind" in meta else meta["dtype"]

    def __len__(self) -> int:
        return self.catalogue.rows("SELECT COUNT(*) FROM documents WHERE expires > ?", (time.time(),))[0][0]

    def __contains__(self, document_id: str) -> bool:
        return bool(self.catalogue.locate(document_id))

    def ids(self) -> list[str]:
        """The documents, in the order in which they were added first."""
        query = "SELECT id FROM documents WHERE expires > ? ORDER BY document"
        return [row[0] for row in self.catalogue.rows(query, (time.time(),))]

    def text(self, document_id: str) -> tuple[str, dict]:
        """Text and metadata of a document.

        Raises:
            MissingDocumentError: it is not there.
        """
        found = self.catalogue.text(document_id)
        if found is None:
            raise MissingDocumentError([document_id], str(self.folder))
        return found

    # writing

    def add(
        self,
        ids: str | Iterable[str],
        texts: str | Iterable[str],
        metadata: dict | Iterable[dict | None] | None = None,
        *,
        ttl: float | None = None,
        progress: bool | Callable[[AddReport], object] | None = None,
    ) -> AddReport:
        """Encode the documents that are new or changed; on return all of them are on disk.

        Longer documents are split into passages, which are found, and can be read, by themselves. Commits follow every
        few seconds: what ends the call early, an interrupt too, leaves what was encoded, and the next call goes on.

        Args:
            ids: any Unicode; of the same id twice in a call the later text counts.
            texts: one a document, streamed: a corpus of any size can be a generator.
            metadata: JSON values one a document, found again by `search(where=...)`; None: as they were.
            ttl: seconds after which the documents are gone; None: never.
            progress: show a bar (None: on a terminal), or what is called with the report after each step.

        Raises:
            ValueError: no model, one whose weights changed, counts that differ, or a document that cannot be encoded.
            OSError: the disk is full; what an earlier commit added is untouched.
        """
        ids, texts = ([ids] if isinstance(ids, str) else ids), ([texts] if isinstance(texts, str) else texts)
        metadata = [metadata] if isinstance(metadata, dict) else metadata
        return self.add_documents(zip_rows(ids, texts, metadata), ttl=ttl, progress=progress)

    def add_documents(
        self,
        documents: Iterable[tuple],
        *,
        ttl: float | None = None,
        progress: bool | Callable[[AddReport], object] | None = None,
    ) -> AddReport:
        """`add` of documents that come as (id, text, metadata, ...), as `read_documents` gives them."""
        # a bar for itself, unless the caller shows the report
        with tqdm(unit=" tokens", disable=callable(progress) or (None if progress is None else not progress)) as bar:

            def show(report: AddReport) -> None:
                bar.set_postfix(documents=report.encoded, refresh=False)
                bar.update(report.tokens - bar.n)

            adder = self._adder(expiry(ttl), progress if callable(progress) else show)
            report = adder.add(document[:3] for document in documents)
        if adder.shards > SMALL_SHARDS:
            self.compact()
        return report

    def _adder(self, expires: float, progress: Callable[[AddReport], object]) -> Adder:
        self.catalogue.check_writable()
        if self.model is None:
            raise ValueError("this store was opened without `model` and `processor`: it cannot encode.")
        options = {"dtype": self.dtype, "expires": expires, "passage_tokens": self.passage_tokens}
        return Adder(*self._writing(), model=self.model, processor=self.processor, **options, progress=progress)

    def _writing(self) -> tuple:
        reserve = None if self.max_bytes is None else self._reserve
        return self.catalogue, self.fingerprint, self._room.shard_bytes, self.metrics, reserve

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
        self.catalogue.check_writable()
        if cache.fingerprint != self.fingerprint:
            raise ValueError(
                f"these states have the fingerprint {cache.fingerprint}, the store's is {self.fingerprint}; "
                "encode them with the store's model."
            )
        rows = [checked_row(*row) for row in zip_rows(ids, texts, metadata)]
        if cache.rows != tuple((number,) for number in range(len(rows))) or len(cache.offsets) != len(rows) + 1:
            raise ValueError(f"`cache` must have one row a document ({len(rows)}), got {cache.rows!r:.80}.")
        if len({row[0] for row in rows}) < len(rows):
            raise ValueError("`ids` of precomputed states must be distinct.")
        writer, expires = Writer(*self._writing()), expiry(ttl)
        for (name, text, own), parts in zip(rows, contexts_of(convert(cache.to("cpu"), self.dtype)), strict=True):
            content = content_digest(parts["token_ids"])
            passage = NewPassage(0, len(text), text, index_text(text), content)
            writer.put({content: parts})
            writer.documents[name] = NewDocument(name, text, content.hex(), own, expires, [passage])
        writer.write()

    # bounds

    def _reserve(self, needed: int, name: str) -> None:
        self.metrics.add(evictions=self._room.reserve(needed, name))

    def pin(self, ids: str | Sequence[str], ttl: float | None = None) -> Handle:
        """Keep documents from being evicted until the handle is released or `ttl` seconds have passed.

        Raises:
            MissingDocumentError: a document that is not there; none is pinned then.
        """
        ids = [ids] if isinstance(ids, str) else list(ids)
        token, expires = secrets.token_hex(12), expiry(ttl)
        if missing := self._room.pin(token, ids, expires):
            raise MissingDocumentError(missing, str(self.folder))
        return Handle(self, ids, token, expires)

    def release(self, token: str) -> None:
        """Release a handle by its token."""
        self._room.unpin(token)

    def evict(self, ids: str | Sequence[str] | None = None, max_bytes: int | None = None) -> int:
        """Remove documents: `ids`, or the least recently used ones until shards hold at most `max_bytes`.

        Without arguments those whose time to live is over go, and the bound of the store is enforced.

        Returns:
            Documents removed.

        Raises:
            MissingDocumentError: an id that is not there; none is removed then.
            ValueError: pinned documents; none is removed then.
        """
        if ids is not None:
            ids = [ids] if isinstance(ids, str) else list(dict.fromkeys(ids))
            missing, pinned = self._room.remove(ids)
            if missing:
                raise MissingDocumentError(missing, str(self.folder))
            if pinned:
                names = ", ".join(map(repr, pinned[:8]))
                raise ValueError(f"pinned documents cannot be evicted: {names}; release them.")
            count = len(ids)
        else:
            limit = max_bytes if max_bytes is not None else self.max_bytes
            count = self._room.make(0, FOREVER if limit is None else limit)
        self.metrics.add(evictions=count)
        return count

    def compact(self) -> int:
        """Join small shards and drop what dead documents hold; returns the bytes of shards won back."""
        self.catalogue.check_writable()
        return self._room.compact()

    # reading

    def get(self, documents: str | Hit | Sequence[str | Hit]) -> ContextCache:
        """The states of documents, one row each, in that order; of a `Hit` those of its passage alone.

        A row of a document that was split reads all its passages.

        Raises:
            MissingDocumentError: a document that is not there, or not any more.
            DamagedDocumentError: stored states that fail their checksum.
            ValueError: nothing is asked for.
        """
        wanted = [documents] if isinstance(documents, str | Hit) else list(documents)
        if not wanted:
            raise ValueError("`documents` must name at least one document, got an empty list.")
        asked = [(one.id, one.position) if isinstance(one, Hit) else (one, None) for one in wanted]
        with self.metrics.timed("get"):
            cache, rows = self._reader.read(asked, self.fingerprint)
        if not self.read_only:
            self._room.use(row[0].document for row in rows)
        self.metrics.add(hits=len(asked), bytes_read=round(cache.offsets[-1] * cache.bytes_per_token))
        return cache

    def search(self, query: str, k: int = 4, where: dict | None = None) -> list[Hit]:
        """The `k` passages that match `query` best by BM25 over their words.

        Args:
            query: words; common ones count only where there are no others.
            where: metadata that their documents must have, `{field: value}` or `{field: [values]}`.

        Raises:
            ValueError: an empty query, or `k` that is no count.
        """
        check_count("k", k)
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"`query` must be words, got {query!r:.80}.")
        with self.metrics.timed("search"):
            return search(self.catalogue, query, k, where)

    def request(self) -> AbstractContextManager[Counters]:
        """A context that counts what happens inside apart: `with store.request() as cost: ...`."""
        return self.metrics.request()

    def stats(self) -> dict:
        """Sizes of the namespace and counters since it was opened."""
        fixed = {"namespace": self.namespace, "fingerprint": self.fingerprint, "dtype": self.dtype}
        return {**fixed, **self.catalogue.totals(), **vars(self.metrics.total)}

    def prometheus(self) -> str:
        """Counters, latencies and sizes in Prometheus text form."""
        return self.metrics.text(self.catalogue.totals())

    # damage

    def verify(self, repair: bool = False) -> VerifyReport:
        """Read every context; documents with damaged ones are named, and with `repair` encoded again."""
        report = self._reader.verify()
        if repair and report.damaged:
            report.repaired = self.repair(report.damaged)
        return report

    def repair(self, ids: Sequence[str] | None = None) -> list[str]:
        """Encode documents again from the text in the catalogue; default: those found damaged.

        Raises:
            ValueError: no model, or one whose weights or tokens are others now.
            MissingDocumentError: an id that is not there.
        """
        adder = self._adder(FOREVER, lambda report: None)
        places = {name: self.catalogue.locate(name) for name in ids or ()}
        if missing := [name for name, found in places.items() if not found]:
            raise MissingDocumentError(missing, str(self.folder))
        self.catalogue.mark_damaged(place for found in places.values() for place in found)
        damaged = self.catalogue.damaged()
        adder.encode_again(damaged)
        return list(dict.fromkeys(name for _, _, name in damaged)) if ids is None else list(ids)

    def snapshot(self, url: str | Path, **options) -> Manifest:
        """Publish the namespace; see `xcllama.store.snapshots.write_snapshot`."""
        if self._source is not None:
            raise ValueError(f"{self._source.source.url} is a snapshot: copy it with `pull`.")
        return write_snapshot(self.folder, url, **options)
