"""Exact and near-duplicate texts, found by digest and by MinHash."""

from collections import OrderedDict
from dataclasses import dataclass

import xxhash
from datasketch import MinHash, MinHashLSH

from dataset_builders.splits import digest, normalize

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
THRESHOLD = 0.7
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
