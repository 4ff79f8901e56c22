"""The training mix: several sources interleaved, with nothing of its test and benchmark contexts left in training.

The first pass counts every source and indexes the contexts of validation, test and benchmarks; each split is then
streamed. Precedence: benchmarks and test, then validation, then train. A row whose useful context occurs in a split of
higher precedence, or shares a run of 13 words with a benchmark, is removed; where it is a distractor, only the
distractor is.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from dataset_builders.duplicates import RUN_WORDS, ContextIndex, RunIndex
from dataset_builders.reading import read_source
from dataset_builders.schema import Report, Row
from dataset_builders.sources import SOURCES, get_source, terms

OFFLINE_SOURCES = ("coqa", "coqa_school", "boolq", "drop", "sciq", "qasper")
OFFLINE_BENCHMARKS = ("squad_sample", "biomedical")
# a split of the mix -> the splits that it must share no context with
HELD_OUT = {"train": {"validation", "test"}, "validation": {"test"}, "test": set()}


def build_mix(
    names: list[str] | None = None,
    paths: dict[str, str] | None = None,
    benchmarks: list[str] | None = None,
    seed: int = 0,
    commercial_only: bool = False,
    on_error: str = "limit",
    num_proc: int = 1,
) -> "Mix":
    """Prepare a mix of sources.

    Args:
        names: sources to mix; None: those that install from PyPI.
        paths: where to read a source from, for those without a default.
        benchmarks: sources whose contexts must not be trained on; None: the PyPI ones.
        seed: order of the rows, and whatever a source shuffles; never what is train, validation or test.
        commercial_only: leave out the sources whose terms do not allow commercial use.
        on_error, num_proc: as for `read_source`.

    Raises:
        ValueError: an unknown name, an evaluation-only source among `names`, or no source left.
    """
    names, benchmarks = choose_sources(names, benchmarks, commercial_only)
    paths = paths or {}

    def read(name: str, split: str, report: Report | None) -> Iterator[Row]:
        return read_source(name, paths.get(name), split, seed, on_error, report, num_proc=num_proc)

    return Mix(names, benchmarks, seed, read)


def choose_sources(
    names: list[str] | None, benchmarks: list[str] | None, commercial_only: bool
) -> tuple[list[str], list[str]]:
    """The sources to mix and the benchmarks, checked as `build_mix` says."""
    names = list(OFFLINE_SOURCES if names is None else names)
    benchmarks = list(OFFLINE_BENCHMARKS if benchmarks is None else benchmarks)
    for name in names + benchmarks:
        if get_source(name).evaluation_only and name in names:
            raise ValueError(f"{name!r} is for evaluation only; pass it in `benchmarks`, not in `names`.")
    if commercial_only:
        names = [name for name in names if SOURCES[name].commercial]
    if not names or len(set(names + benchmarks)) != len(names + benchmarks):
        rule = "`names` and `benchmarks` must be distinct and leave a source to mix"
        raise ValueError(f"{rule}, got {names} and {benchmarks}.")
    return names, benchmarks


class Mix:
    """Streams of the splits of a mix, and the table of what was read, kept and removed. Made by `build_mix`."""

    def __init__(
        self,
        names: list[str],
        benchmarks: list[str],
        seed: int,
        read: Callable[[str, str, Report | None], Iterator[Row]],
    ):
        self.names, self.benchmarks, self.seed, self._read = names, benchmarks, seed, read
        self.reports = {name: Report() for name in names + benchmarks}
        self.counts = {name: Counter() for name in names + benchmarks}
        self.splits: dict[str, dict[str, Any]] = {}
        self._index, self._benchmark_runs = ContextIndex(), RunIndex()
        # digest of an indexed context -> the splits and benchmarks that hold it
        self._holders: dict[str, set[str]] = {}
        self._found: dict[str, set[str]] = {"exact": set(), "near": set()}
        for name in names + benchmarks:
            self._scan(name)

    def _scan(self, name: str) -> None:
        for row in self._read(name, "all", self.reports[name]):
            split = SOURCES[name].split(row)
            self.counts[name][split] += 1
            if split == "train" and name not in self.benchmarks:
                continue
            holder = name if name in self.benchmarks else split
            for text in row["contexts_list"]:
                if name in self.benchmarks:
                    self._benchmark_runs.add(text)
                self._holders.setdefault(self._index.add(text), set()).add(holder)

    def rows(self, split: str) -> Iterator[Row]:
        """Stream the rows of "train", "validation" or "test", interleaved at random in proportion to the sizes."""
        if split not in HELD_OUT:
            raise ValueError(f"`split` must be one of {', '.join(HELD_OUT)}, got {split!r}.")
        kept, removed, fingerprint = Report(), Counter(), hashlib.blake2b(digest_size=16)
        seen: set[bytes] = set()
        for row in self._interleave(split):
            row, reason = self._clean(row, split, removed)
            identity = content_digest(row)
            if reason is None and identity in seen:
                reason = "repeated row"
            if reason is not None:
                kept.drop(reason)
                continue
            seen.add(identity)
            fingerprint.update(identity)
            kept.keep()
            yield row
        table = kept.as_dict() | {
            "distractors_removed": removed["distractors"],
            "fingerprint": fingerprint.hexdigest(),
        }
        self.splits[split] = table

    def _interleave(self, split: str) -> Iterator[Row]:
        generator = random.Random(f"{self.seed}:{split}")
        remaining = {name: self.counts[name][split] for name in self.names if self.counts[name][split]}
        streams = {name: self._read(name, split, None) for name in remaining}
        while remaining:
            name = generator.choices(list(remaining), weights=list(remaining.values()))[0]
            yield next(streams[name])
            remaining[name] -= 1
            if not remaining[name]:
                del remaining[name]

    def _clean(self, row: Row, split: str, removed: Counter) -> tuple[Row, str | None]:
        """The row without foreign distractors, and the reason to remove it, if any."""
        forbidden = HELD_OUT[split] | set(self.benchmarks)
        kept = []
        for index, text in enumerate(row["contexts_list"]):
            matches = [match for match in self._index.find(text) if self._holders[match.digest] & forbidden]
            if split == "train":
                for match in matches:
                    self._found["exact" if match.exact else "near"].add(match.digest)
            reason = None
            if matches:
                kind = "exact" if any(match.exact for match in matches) else "near"
                reason = f"{kind} duplicate of a held-out context"
            elif self._benchmark_runs.overlaps(text):
                reason = f"{RUN_WORDS} words in a row of a benchmark"
            if reason and (index in row["useful_contexts"] or not row["useful_contexts"]):
                return row, reason
            if not reason:
                kept.append(index)
        if len(kept) < len(row["contexts_list"]):
            removed["distractors"] += len(row["contexts_list"]) - len(kept)
            row = select_contexts(row, kept)
        return row, None

    def report(self) -> dict[str, Any]:
        """The build table; the splits and the overlap of those streamed to their end."""
        sources = {
            name: report.as_dict() | {"splits": dict(self.counts[name])} | terms(name)
            for name, report in self.reports.items()
        }
        overlap = {holder: self._overlap(holder) for holder in [*self.benchmarks, "test", "validation"]}
        return {"seed": self.seed, "sources": sources, "mix": self.splits, "contexts_found_in_training": overlap}

    def _overlap(self, holder: str) -> dict[str, int]:
        held = {key for key, holders in self._holders.items() if holder in holders}
        exact = self._found["exact"] & held
        return {"contexts": len(held), "exact": len(exact), "near": len((self._found["near"] & held) - exact)}


def content_digest(row: Row) -> bytes:
    """Digest of what a row says, whatever its `sample_idx`."""
    content = {name: value for name, value in row.items() if name != "sample_idx"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def select_contexts(row: Row, indices: list[int]) -> Row:
    """The row with only those contexts, in that order."""
    new_index = {old: new for new, old in enumerate(indices)}
    return row | {
        "titles_list": [row["titles_list"][index] for index in indices],
        "contexts_list": [row["contexts_list"][index] for index in indices],
        "useful_contexts": [new_index[index] for index in row["useful_contexts"] if index in new_index],
    }
