"""The contexts of a run: which a request reads, and their caches, encoded once and kept in memory and on disk."""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)

CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "int4")
MANIFEST = "contexts.json"
# contexts handed to the model's encoder at a time; it batches them by length itself
CONTEXTS_PER_CALL = 64

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
    """Caches of contexts by their text: each is encoded once, by one of the processes, and looked for on disk first.

    Args:
        model: an XC model.
        processor: its processor.
        folder: where caches are kept between runs, of every dtype; None: in memory only.
        dtype: of the stored states, one of `CACHE_DTYPES`; "auto" is the model's.
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
        self.model, self.processor, self.truncation = model, processor, truncation
        self.own_dtype = str(model.dtype).removeprefix("torch.")
        self.dtype = self.own_dtype if dtype == "auto" else dtype
        self.folder = Path(folder) if folder else None
        self.rank, self.gather = rank, gather
        self.caches: dict[str, Any] = {}
        # of all processes
        self.encoded: set[str] = set()
        self.loaded: set[str] = set()
        if self.folder is not None:
            self._claim_folder()

    def _claim_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        fingerprint, manifest = self.model.model.context_fingerprint(), self.folder / MANIFEST
        if not manifest.exists():
            partial = manifest.with_name(f".{MANIFEST}.{secrets.token_hex(4)}.partial")
            partial.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
            os.replace(partial, manifest)
        found = json.loads(manifest.read_text()).get("fingerprint")
        if found != fingerprint:
            raise ValueError(
                f"`context_cache_dir` {self.folder} holds contexts with fingerprint {found!r}, this model's is "
                f"{fingerprint!r}: give another folder, or none."
            )

    def _path(self, text: str, dtype: str) -> Path:
        return self.folder / dtype / f"{text_digest(text)}.safetensors"

    def _load(self, text: str) -> Any | None:
        """The kept cache of a text, converted where only the model's own states are kept; None: neither is."""
        for dtype in (self.dtype, self.own_dtype) if self.folder is not None else ():
            if (path := self._path(text, dtype)).exists():
                cache = self.model.load_context(path)
                return cache if dtype == self.dtype else self._converted(cache)
        return None

    def _converted(self, cache: Any) -> Any:
        if self.dtype in ("int8", "int4"):
            return cache.quantize(self.dtype)
        return cache.to(dtype=getattr(torch, self.dtype))

    def fetch(self, texts: Iterable[str]) -> set[str]:
        """Have a cache for each of `texts`; returns those that had to be encoded now.

        Every process calls it at the same time.
        """
        missing = {text for text in texts if text not in self.caches}
        kept = {text: cache for text in missing if (cache := self._load(text)) is not None}
        self.caches |= kept
        missing -= set(kept)
        self.loaded |= set(self.gather(list(kept)))
        wanted_by: dict[str, list[int]] = {}
        for rank, text in self.gather([(self.rank, text) for text in sorted(missing)]):
            wanted_by.setdefault(text, []).append(rank)
        # those that want a text take turns
        owners = {text: ranks[place % len(ranks)] for place, (text, ranks) in enumerate(wanted_by.items())}
        # long ones first: each call holds contexts of similar length, the same in every run
        mine = sorted((text for text in sorted(missing) if owners[text] == self.rank), key=len, reverse=True)
        for start in range(0, len(mine), CONTEXTS_PER_CALL):
            self._encode(mine[start : start + CONTEXTS_PER_CALL])
        self.encoded |= set(wanted_by)
        shared = [(text, self.caches[text].to("cpu")) for text in mine if len(wanted_by[text]) > 1]
        for text, cache in self.gather(shared):
            if text in missing:
                self.caches[text] = cache
        return missing

    def _encode(self, texts: list[str]) -> None:
        inputs = self.processor(contexts=texts, truncation=self.truncation, return_tensors="pt")
        encoded = self.model.encode_context(
            inputs["context_input_ids"].to(self.model.device), inputs["context_attention_mask"].to(self.model.device)
        )
        for index, text in enumerate(texts):
            self.caches[text] = cache = self._converted(encoded.select([index]).compact())
            if self.folder is not None:
                path = self._path(text, self.dtype)
                path.parent.mkdir(exist_ok=True)
                cache.save(path)

    def rows(self, requests: Sequence[Texts]):
        """One cache with a row for each of `requests` (tuples of texts that were fetched)."""
        distinct = list(dict.fromkeys(text for texts in requests for text in texts))
        place = {text: index for index, text in enumerate(distinct)}
        caches = [self.caches[text].to(self.model.device) for text in distinct]
        joined = type(caches[0]).concat(caches)
        return joined.join([[place[text] for text in texts] for texts in requests])

    def size(self, texts: Texts) -> tuple[int, int]:
        """(tokens, bytes of the cached states) of some contexts."""
        caches = [self.caches[text] for text in texts]
        return sum(cache.num_tokens for cache in caches), sum(cache.nbytes for cache in caches)

    def summary(self) -> dict[str, Any]:
        """What became of the contexts of the run so far."""
        tokens = sum(cache.num_tokens for cache in self.caches.values())
        size = sum(cache.nbytes for cache in self.caches.values())
        return {
            "cache_dtype": self.dtype,
            "contexts": len(self.encoded | self.loaded),
            "contexts_encoded": len(self.encoded),
            "contexts_from_folder": len(self.loaded - self.encoded),
            "cache_bytes_per_token": size / tokens if tokens else None,
        }
