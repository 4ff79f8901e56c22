"""The contexts of a run: which a request reads, and their caches, encoded once and kept in memory and on disk."""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterable, Sequence
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


def other_contexts(requests: Sequence[Instance], seed: int) -> list[Texts]:
    """For each request the contexts of another document of its task, none of them its own: the wrong-context control.

    The documents of a task stand on a ring in an order that depends on `seed` only; each reads its nearest successor
    with which it shares no text. With several processes the documents are those of one process.

    Raises:
        ValueError: a document shares a text with every other one.
    """
    own = [contexts_of(request) for request in requests]
    rings: dict[str | None, list[Texts]] = {}
    for task in {request.task_name for request in requests}:
        distinct = {texts for request, texts in zip(requests, own, strict=True) if request.task_name == task}
        rings[task] = sorted(distinct, key=lambda texts: text_digest(f"{seed}\n{texts}"))
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


def text_digest(text: str) -> str:
    """128-bit digest of a text, exact to the byte."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class ContextPool:
    """Caches of contexts by their text: each is encoded once, and looked for on disk first.

    Args:
        model: an XC model.
        processor: its processor.
        folder: where caches are kept between runs; None: in memory only.
        dtype: of the stored states, one of `CACHE_DTYPES`; "auto" is the model's.
        truncation: cut contexts that are longer than the model takes.

    Raises:
        ValueError: unknown `dtype`, or a folder of another model or dtype.
    """

    def __init__(self, model, processor, folder: str | None, dtype: str, truncation: bool):
        if dtype not in CACHE_DTYPES:
            raise ValueError(f"`cache_dtype` must be one of {', '.join(CACHE_DTYPES)}, got {dtype!r}.")
        self.model, self.processor, self.truncation = model, processor, truncation
        self.dtype = str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype
        self.folder = Path(folder) if folder else None
        self.caches: dict[str, Any] = {}
        self.encoded = self.loaded = 0
        if self.folder is not None:
            self._claim_folder()

    def _claim_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        ours = {"fingerprint": self.model.model.context_fingerprint(), "dtype": self.dtype}
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            partial = manifest.with_name(f".{MANIFEST}.{secrets.token_hex(4)}.partial")
            partial.write_text(json.dumps(ours) + "\n")
            os.replace(partial, manifest)
        found = json.loads(manifest.read_text())
        for field, value in ours.items():
            if found.get(field) != value:
                raise ValueError(
                    f"`context_cache_dir` {self.folder} holds contexts with {field} {found.get(field)!r}, this "
                    f"run has {value!r}: give another folder, or none."
                )

    def _path(self, text: str) -> Path:
        return self.folder / f"{text_digest(text)}.safetensors"

    def fetch(self, texts: Iterable[str]) -> set[str]:
        """Have a cache for each of `texts`; returns those that had to be encoded now."""
        missing = [text for text in dict.fromkeys(texts) if text not in self.caches]
        if self.folder is not None:
            for text in [text for text in missing if self._path(text).exists()]:
                self.caches[text] = self.model.load_context(self._path(text))
                self.loaded += 1
            missing = [text for text in missing if text not in self.caches]
        # long ones first: each call holds contexts of similar length
        missing.sort(key=len, reverse=True)
        for start in range(0, len(missing), CONTEXTS_PER_CALL):
            self._encode(missing[start : start + CONTEXTS_PER_CALL])
        return set(missing)

    def _encode(self, texts: list[str]) -> None:
        inputs = self.processor(contexts=texts, truncation=self.truncation, return_tensors="pt")
        encoded = self.model.encode_context(
            inputs["context_input_ids"].to(self.model.device), inputs["context_attention_mask"].to(self.model.device)
        )
        for index, text in enumerate(texts):
            cache = encoded.select([index]).compact()
            if self.dtype in ("int8", "int4"):
                cache = cache.quantize(self.dtype)
            else:
                cache = cache.to(dtype=getattr(torch, self.dtype))
            if self.folder is not None:
                cache.save(self._path(text))
            self.caches[text] = cache
            self.encoded += 1

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
            "contexts": len(self.caches),
            "contexts_encoded": self.encoded,
            "contexts_from_folder": self.loaded,
            "cache_bytes_per_token": size / tokens if tokens else None,
        }
