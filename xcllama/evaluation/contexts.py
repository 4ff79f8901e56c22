"""The contexts of a run: which a request reads, and their caches, encoded once and kept in memory and on disk."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance

from xcllama.store import ContextStore
from xcllama.store.encoding import DTYPES, convert

CACHE_DTYPES = ("auto", *DTYPES)

Texts = tuple[str, ...]
# a list of this process -> the lists of all processes as one, the same in each
Gather = Callable[[list], list]


def contexts_of(request: Instance) -> Texts:
    """The contexts that a request's document brings.

    Raises:
        ValueError: it brings none.
    """
    contexts = request.doc.get("contexts_list") if isinstance(request.doc, dict) else None
    if not contexts or not all(isinstance(text, str) and text.strip() for text in contexts):
        raise ValueError(
            f"document {request.doc_id} of task {request.task_name!r} has no contexts (field `contexts_list`): "
            "use a task that has them (`xc_offline`, `xc_paper`), or context_mode=none."
        )
    return tuple(contexts)


def other_contexts(requests: Sequence[Instance], seed: int, gather: Gather = list) -> list[Texts]:
    """For each request the contexts of another document of its task, none of them its own: the wrong-context control.

    The documents of a task, of all processes, stand on a ring in an order that depends on `seed` only; each reads its
    nearest successor with which it shares no text.

    Raises:
        ValueError: a document shares a text with every other one.
    """
    own = [contexts_of(request) for request in requests]
    members: dict[str | None, set[Texts]] = {}
    for task, texts in gather([(request.task_name, texts) for request, texts in zip(requests, own, strict=True)]):
        members.setdefault(task, set()).add(texts)
    order = partial(_ring_place, seed)
    rings = {task: sorted(distinct, key=order) for task, distinct in members.items()}
    places = {task: {texts: place for place, texts in enumerate(ring)} for task, ring in rings.items()}
    chosen = []
    for request, texts in zip(requests, own, strict=True):
        ring, place = rings[request.task_name], places[request.task_name][texts]
        successors = (ring[(place + step) % len(ring)] for step in range(1, len(ring)))
        other = next((candidate for candidate in successors if not set(candidate) & set(texts)), None)
        if other is None:
            raise ValueError(
                f"context_mode=cross_shuffled found no other context for document {request.doc_id} of task "
                f"{request.task_name!r}: it needs two documents without a common text; raise --limit."
            )
        chosen.append(other)
    return chosen


def _ring_place(seed: int, texts: Texts) -> str:
    return text_digest(f"{seed}\n{texts}")


def text_digest(text: str) -> str:
    """128-bit digest of a text, exact to the byte."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class ContextPool:
    """The store of a run's contexts, by their text: each is encoded once, by one of the processes.

    Args:
        model: an XC model.
        processor: its processor.
        folder: the store's, kept between runs; it holds the model's own states, whatever `dtype`. None: of this run.
        dtype: that contexts are read in, one of `CACHE_DTYPES`; "auto" is the model's.
        truncation: cut contexts that are longer than the model takes.
        rank, gather: this process among those that share the work, and what exchanges lists between them.

    Raises:
        ValueError: unknown `dtype`, or a folder of another model.
    """

    def __init__(
        self,
        model,
        processor,
        folder: str | None,
        dtype: str,
        truncation: bool,
        rank: int = 0,
        gather: Gather = list,
    ):
        if dtype not in CACHE_DTYPES:
            raise ValueError(f"`cache_dtype` must be one of {', '.join(CACHE_DTYPES)}, got {dtype!r}.")
        self.model, self.truncation, self.rank, self.gather = model, truncation, rank, gather
        self.dtype = str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype
        self.processor, self._processor = processor, partial(processor, truncation=truncation)
        # all that a store asks of it besides
        self._processor.template_version = processor.template_version
        # of all processes
        self.encoded: set[str] = set()
        self.loaded: set[str] = set()
        self.bytes_per_token: float | None = None
        # a folder of this run alone goes with this object; the first process's serves all of its machine
        self._scratch = None if folder else tempfile.TemporaryDirectory()
        self.store: ContextStore | None = self._open(folder) if folder else None

    def _open(self, folder: str) -> ContextStore:
        try:
            return ContextStore(folder, self.model, self._processor, passage_tokens=None)
        except ValueError as error:
            raise ValueError(f"`context_cache_dir` does not serve this model: {error}") from error

    def _id(self, text: str) -> str:
        # what was cut is another document than the whole, or than what was cut elsewhere
        return text_digest(f"{self.processor.context_max_length}: {text}" if self.truncation else text)

    def fetch(self, texts: Iterable[str]) -> set[str]:
        """Have states of each of `texts`; returns those that had to be encoded now.

        Every process calls it at the same time.
        """
        if self.store is None:
            self.store = self._open(self.gather([self._scratch.name])[0])
        store, wanted = self.store, set(texts)
        missing = {text for text in wanted if self._id(text) not in store}
        self.loaded |= set(self.gather(sorted(wanted - missing)))
        wanted_by: dict[str, list[int]] = {}
        for rank, text in self.gather([(self.rank, text) for text in sorted(missing)]):
            wanted_by.setdefault(text, []).append(rank)
        # those that want a text take turns
        owners = {text: ranks[place % len(ranks)] for place, (text, ranks) in enumerate(wanted_by.items())}
        # long ones first: each call holds contexts of similar length, the same in every run
        self._encode(sorted((text for text in sorted(missing) if owners[text] == self.rank), key=len, reverse=True))
        self.encoded |= set(wanted_by)
        self.gather([])
        # what another machine encoded is in its own folder
        self._encode(sorted(text for text in missing if self._id(text) not in store))
        return missing

    def _encode(self, texts: list[str]) -> None:
        if texts:
            self.store.add(map(self._id, texts), texts, progress=False)

    def rows(self, requests: Sequence[Texts]):
        """One cache with a row for each of `requests` (tuples of texts that were fetched)."""
        distinct = list(dict.fromkeys(text for texts in requests for text in texts))
        place = {text: index for index, text in enumerate(distinct)}
        cache = convert(self.store.get([self._id(text) for text in distinct]), self.dtype).to(self.model.device)
        return cache.join([[place[text] for text in texts] for texts in requests])

    def size(self, texts: Texts) -> tuple[int, int]:
        """(tokens, bytes of the states as they are read) of some contexts."""
        ids = [self._id(text) for text in texts]
        tokens = sum(place.tokens for name in ids for place in self.store.catalogue.locate(name))
        if self.bytes_per_token is None:
            self.bytes_per_token = convert(self.store.get(ids[:1]), self.dtype).bytes_per_token
        return tokens, round(tokens * self.bytes_per_token)

    def summary(self) -> dict[str, Any]:
        """What became of the contexts of the run so far."""
        return {
            "cache_dtype": self.dtype,
            "contexts": len(self.encoded | self.loaded),
            "contexts_encoded": len(self.encoded),
            "contexts_from_folder": len(self.loaded - self.encoded),
            "cache_bytes_per_token": self.bytes_per_token,
        }
