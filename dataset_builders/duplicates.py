"""Texts that say the same: equal (by digest), nearly equal (by MinHash), or with a run of words in common."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import xxhash
from datasketch import MinHash, MinHashLSH

from dataset_builders.splits import digest, normalize

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
THRESHOLD = 0.7
RUN_WORDS = 13
_REMEMBERED = 4096


@dataclass(frozen=True)
class Match:
    """An indexed text equal to the one looked up (`exact`), or with a Jaccard similarity of at least `THRESHOLD`."""

    digest: str
    exact: bool


def min_hash(text: str) -> MinHash:
    """Signature of the 5-word shingles of the normalized text (of the whole text when it is shorter)."""
    words = normalize(text).split(" ")
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    signature = MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)
    signature.update_batch({" ".join(words[start : start + SHINGLE_WORDS]).encode() for start in range(count)})
    return signature


class ContextIndex:
    """Texts to keep out of somewhere: add them, then ask whether a text, or nearly the same, is among them.

    Memory: about 3 KB a distinct text, whatever its length.
    """

    def __init__(self):
        self._signatures: dict[str, MinHash] = {}
        # rather too many candidates than too few: each is compared before it counts
        self._index = MinHashLSH(threshold=THRESHOLD, num_perm=NUM_PERMUTATIONS, weights=(0.1, 0.9))
        self._recent: OrderedDict[str, tuple[Match, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._signatures)

    def add(self, text: str) -> str:
        """Index `text` and return its digest, under which `find` reports it."""
        key = digest(text)
        if key not in self._signatures:
            self._signatures[key] = min_hash(text)
            self._index.insert(key, self._signatures[key])
            self._recent.clear()
        return key

    def find(self, text: str) -> tuple[Match, ...]:
        """All indexed texts that `text` duplicates, sorted by digest; none: an empty tuple."""
        key = digest(text)
        if key not in self._recent:
            # questions on one context follow each other: remember a few answers
            if len(self._recent) >= _REMEMBERED:
                self._recent.popitem(last=False)
            self._recent[key] = self._search(key, text)
        return self._recent[key]

    def _search(self, key: str, text: str) -> tuple[Match, ...]:
        signature = self._signatures.get(key) or min_hash(text)
        # candidates share a band; their estimated similarity decides
        near = {c for c in self._index.query(signature) if self._signatures[c].jaccard(signature) >= THRESHOLD}
        found = near | ({key} if key in self._signatures else set())
        return tuple(Match(candidate, candidate == key) for candidate in sorted(found))


class RunIndex:
    """Runs of 13 words of texts to keep out of somewhere: add the texts, then ask whether another holds such a run.

    A run is what a whole text and a longer one that quotes a part of it have in common. Memory: 8 bytes a word.
    """

    def __init__(self):
        self._known, self._added = np.empty(0, np.uint64), []

    def add(self, text: str) -> None:
        self._added.append(_runs(text))

    def overlaps(self, text: str) -> bool:
        """Whether `text` holds a run of an added text."""
        if self._added:
            self._known, self._added = np.unique(np.concatenate([self._known, *self._added])), []
        runs = _runs(text)
        if not len(self._known) or not len(runs):
            return False
        places = np.searchsorted(self._known, runs).clip(max=len(self._known) - 1)
        return bool((self._known[places] == runs).any())


def _runs(text: str) -> np.ndarray:
    """A 64-bit digest of each run of `RUN_WORDS` words of the normalized text, uint64 `[num_runs]`."""
    words = np.array([xxhash.xxh64_intdigest(word.encode()) for word in normalize(text).split(" ")], np.uint64)
    count = max(0, len(words) - RUN_WORDS + 1)
    total = np.zeros(count, np.uint64)
    for offset in range(RUN_WORDS):
        # a polynomial in an odd number, modulo 2 ** 64
        total = total * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + count]
    return total
