"""Documents on their way into a store: cut into passages, encoded a second's work at a time, committed every few."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor

from modeling_xcllama.passages import split_passages

from .catalogue import Catalogue, NewDocument, NewPassage, NewState
from .counters import Metrics
from .encoding import content_digest, contexts_of, encode, groups, tokenize, tokens_per_call
from .search import index_text
from .shards import HEADER_BYTES, describe, new_shard_name, parts_checksum, write_shard

# seconds of encoding that a crash may lose: shards of slow machines are written before they are full
UNWRITTEN_SECONDS = 5.0
# documents that wait for one commit, at most
DOCUMENTS_AT_ONCE = 256
# commits of documents whose states go away each time before they are entered
ATTEMPTS = 5

Parts = dict[str, Tensor]


@dataclass
class AddReport:
    """What `add` has done so far.

    Args:
        encoded: documents that are kept now.
        skipped: documents that were there, unchanged.
        tokens, seconds: encoded, and the time it took.
        waiting: tokens of documents taken so far that are still to be encoded.
        characters: of documents taken so far, without those that were skipped.
    """

    encoded: int = 0
    skipped: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waiting: int = 0
    characters: int = 0


def zip_rows(ids: Iterable[str], texts: Iterable[str], metadata: Iterable[dict | None] | None) -> Iterator[tuple]:
    """(id, text, metadata) of each document.

    Raises:
        ValueError: other counts of ids, texts and metadata.
    """
    rows = zip(*[values for values in (ids, texts, metadata) if values is not None], strict=True)
    while True:
        try:
            row = next(rows)
            yield row if metadata is not None else (*row, None)
        except StopIteration:
            return
        except ValueError as error:
            raise ValueError(f"`ids`, `texts` and `metadata` must have one entry a document: {error}.") from error


def checked_row(document_id: str, text: str, metadata: dict | None) -> tuple[str, str, str | None]:
    """Id, text and metadata as JSON.

    Raises:
        ValueError: a value that is no text, or no valid Unicode.
    """
    if not isinstance(document_id, str) or not document_id or not isinstance(text, str):
        raise ValueError(f"ids and texts must be strings (ids not empty), got {document_id!r:.80} and {text!r:.80}.")
    if not isinstance(metadata, dict | None):
        raise ValueError(f"`metadata` must be a dict a document, got {metadata!r:.80} for {document_id!r:.80}.")
    row = document_id, text, None if metadata is None else json.dumps(metadata, ensure_ascii=False)
    for name, value in zip(("id", "text", "metadata"), row, strict=True):
        try:
            (value or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the {name} of document {document_id!r:.80} has a lone surrogate at character {error.start}, which "
                "no encoding can hold; mend it where it was decoded, or use text.encode(errors='replace').decode()."
            ) from error
    return row


def new_states(contexts: Mapping[bytes, Parts]) -> list[NewState]:
    """What a catalogue says of contexts that lie one after the other in a shard."""
    entries, start = [], 0
    for content, parts in contexts.items():
        tokens, nbytes = len(parts["token_ids"]), sum(part.nbytes for part in parts.values())
        entries.append(NewState(content, start, tokens, nbytes, parts_checksum(parts)))
        start += tokens
    return entries


def cut(
    document_id: str, text: str, processor, passage_tokens: tuple[int, int, int] | None
) -> tuple[list[NewPassage], list[list[int]]]:
    """The passages of a document, and the token ids of each.

    Raises:
        ValueError: it cannot be encoded.
    """

    def count(part: str) -> int:
        return len(tokenize(processor, [part])[0])

    try:
        whole = [(0, len(text))]
        # of white space alone there are no passages
        spans = whole if passage_tokens is None else split_passages(text, count, passage_tokens) or whole
        sequences = tokenize(processor, [text[start:stop] for start, stop in spans])
    except ValueError as error:
        raise ValueError(f"document {document_id!r} cannot be encoded: {error}") from error
    passages = []
    for (start, stop), sequence in zip(spans, sequences, strict=True):
        own = text[start:stop]
        passages.append(NewPassage(start, stop, own, index_text(own), content_digest(sequence)))
    return passages, sequences


class Writer:
    """States and documents that wait for the next commit.

    Args:
        catalogue: of the namespace.
        fingerprint: of the states.
        shard_bytes: size of a full shard.
        metrics: counts what is written.
        reserve: makes room for so many bytes in a bounded store, for a shard of that name.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        fingerprint: str,
        shard_bytes: int,
        metrics: Metrics,
        reserve: Callable[[int, str], None] | None,
    ):
        self.catalogue, self.fingerprint, self.shard_bytes = catalogue, fingerprint, shard_bytes
        self.metrics, self.reserve, self.report = metrics, reserve, AddReport()
        self.states: dict[bytes, Parts] = {}
        self.documents: dict[str, NewDocument] = {}
        # contents that documents wait for: their token ids
        self.waiting: dict[bytes, Sequence[int]] = {}
        self.nbytes = self.shards = 0
        self.begun = perf_counter()

    def put(self, contexts: dict[bytes, Parts]) -> None:
        """Take states that belong into one shard; a full one is written first."""
        size = sum(part.nbytes for parts in contexts.values() for part in parts.values())
        if self.states and self.nbytes + size > self.shard_bytes:
            self.write()
        self.begun = self.begun if self.states else perf_counter()
        self.states |= contexts
        self.nbytes += size
        for content in contexts:
            self.waiting.pop(content, None)

    def write(self) -> list[NewDocument]:
        """Commit the states, and the documents that wait for no others: from then on they are served.

        Returns:
            Documents that could not be entered: states that they share went away meanwhile.
        """
        waits = self.waiting.keys()
        ready = [new for new in self.documents.values() if waits.isdisjoint(at.content for at in new.passages)]
        states, self.states, self.nbytes = self.states, {}, 0
        for document in ready:
            del self.documents[document.id]
        if not states and not ready:
            return []
        with self.metrics.timed("write"), self.catalogue.writing():
            lost = self._commit(states, ready) if states else self.catalogue.commit(None, [], ready, "")
        self.catalogue.drop_dead_shards()
        self.report.encoded += len(ready) - len(lost)
        self.metrics.add(documents_encoded=len(ready) - len(lost))
        return lost

    def _commit(self, states: dict[bytes, Parts], documents: list[NewDocument]) -> list[NewDocument]:
        name, entries, contexts = new_shard_name(), new_states(states), list(states.values())
        if self.reserve is not None:
            self.reserve(sum(entry.nbytes for entry in entries) + HEADER_BYTES, name)
        path = self.catalogue.path.parent / "shards" / name
        try:
            shard = name, *write_shard(path, contexts, self.fingerprint)
            lost = self.catalogue.commit(shard, entries, documents, describe(contexts[0]))
        except BaseException:
            with self.catalogue.transaction() as connection:
                connection.execute("DELETE FROM shards WHERE name = ? AND NOT live", (name,))
                if not connection.execute("SELECT 1 FROM shards WHERE name = ?", (name,)).fetchone():
                    path.unlink(missing_ok=True)
            raise
        self.shards += 1
        self.metrics.add(bytes_written=shard[1])
        return lost


class Adder(Writer):
    """Encodes documents; arguments of `Writer`, and:

    Args:
        model, processor: what encodes.
        dtype: of the states at rest.
        expires: when the documents are gone.
        passage_tokens: sizes of passages (`split_passages`); None: a document is one.
        progress: is called with the report after each step.
    """

    def __init__(self, *args, model, processor, dtype: str, expires: float, passage_tokens=None, progress):
        super().__init__(*args)
        self.model, self.processor, self.dtype, self.expires = model, processor, dtype, expires
        self.passage_tokens, self.progress = passage_tokens, progress
        self.tokens_per_call = tokens_per_call(model)

    def add(self, rows: Iterable[tuple[str, str, dict | None]]) -> AddReport:
        """Encode the documents (id, text, metadata) that are new or changed; whatever ends it, what is done stays."""
        try:
            for row in rows:
                self._take(*checked_row(*row))
                while self._count_waiting() >= self.tokens_per_call:
                    self._encode()
                if len(self.documents) >= DOCUMENTS_AT_ONCE:
                    self._again(self.write())
            for _ in range(ATTEMPTS):
                while self.waiting:
                    self._encode()
                self._again(self.write())
                if not self.documents:
                    break
        finally:
            # a document in the middle of its passages is not entered, but its states are there when it comes again
            self.write()
        if self.documents:
            raise OSError(f"states of {list(self.documents)[:8]} are removed by others as soon as they are there.")
        return self.report

    def _take(self, document_id: str, text: str, metadata: str | None) -> None:
        digest = hashlib.sha256(f"{self.passage_tokens}\n{text}".encode()).hexdigest()
        stored = None if document_id in self.documents else self.catalogue.unchanged(document_id, digest)
        if stored is not None:
            if stored != (metadata or stored[0], self.expires):
                self.catalogue.update(document_id, digest, metadata, self.expires)
            self.report.skipped += 1
            self.metrics.add(documents_skipped=1)
            self.progress(self.report)
            return
        passages, sequences = cut(document_id, text, self.processor, self.passage_tokens)
        self._wait(dict(zip([passage.content for passage in passages], sequences, strict=True)))
        self.documents[document_id] = NewDocument(document_id, text, digest, metadata, self.expires, passages)
        self.report.characters += len(text)
        self._count_waiting()
        self.progress(self.report)

    def _count_waiting(self) -> int:
        self.report.waiting = sum(map(len, self.waiting.values()))
        return self.report.waiting

    def _wait(self, contexts: dict[bytes, Sequence[int]]) -> None:
        """Queue the contexts whose states are nowhere."""
        for content, sequence in contexts.items():
            if content not in self.states and not self.catalogue.has_states(content):
                self.waiting.setdefault(content, sequence)

    def _encode(self) -> None:
        """Encode a second's work of what waits; all of it in a bounded store, where a document stays together."""
        bounded = self.reserve is not None
        wanted = [[at.content for at in document.passages] for document in self.documents.values()]
        # of an id that came twice the first text is not wanted any more
        needed = set().union(*wanted)
        self.waiting = {content: ids for content, ids in self.waiting.items() if content in needed}
        contents = list(self.waiting)
        lengths = [len(self.waiting[content]) for content in contents]
        found: dict[bytes, Parts] = {}
        for group in groups(lengths, self.tokens_per_call):
            found |= self._states(contents[group.start : group.stop])
            if not bounded:
                break
        units = [{content: parts} for content, parts in found.items()]
        if bounded:
            units = [{content: found.pop(content) for content in own if content in found} for own in wanted]
        for unit in filter(None, units):
            self.put(unit)
        if perf_counter() - self.begun > UNWRITTEN_SECONDS:
            self._again(self.write())

    def _states(self, contents: Sequence[bytes]) -> dict[bytes, Parts]:
        begin = perf_counter()
        with self.metrics.timed("encode"):
            cache = encode(self.model, [self.waiting[content] for content in contents], self.dtype)
        if cache.fingerprint != self.fingerprint:
            raise ValueError(
                f"the weights of the model changed while the store was open: its states have the fingerprint "
                f"{self.fingerprint}, new ones {cache.fingerprint}; open another store for them."
            )
        tokens = cache.offsets[-1]
        self.metrics.add(tokens_encoded=tokens)
        self.report.tokens += tokens
        self.report.waiting -= tokens
        self.report.seconds += perf_counter() - begin
        self.progress(self.report)
        return dict(zip(contents, contexts_of(cache), strict=True))

    def _again(self, lost: list[NewDocument]) -> None:
        for document in lost:
            sequences = tokenize(self.processor, [passage.text for passage in document.passages])
            self._wait(dict(zip([passage.content for passage in document.passages], sequences, strict=True)))
            self.documents.setdefault(document.id, document)

    def encode_again(self, damaged: Iterable[tuple[bytes, str, str]]) -> None:
        """Encode the contexts (content, text, id of a document) whose states are marked as damaged.

        Raises:
            ValueError: the processor makes other tokens of a text now.
        """
        for content, text, document_id in damaged:
            (sequence,) = tokenize(self.processor, [text])
            if content_digest(sequence) != content:
                raise ValueError(f"{document_id!r} has other tokens than when it was added: add it again.")
            self.waiting[content] = sequence
        contents = list(self.waiting)
        for group in groups([len(self.waiting[content]) for content in contents], self.tokens_per_call):
            self.put(self._states(contents[group.start : group.stop]))
        self.write()
