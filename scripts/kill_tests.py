"""Kill writers at random moments: nothing acknowledged is lost, nothing is read corrupt, no byte is left over.

python scripts/kill_tests.py --count 1000 --output results/kill_tests.json

A child process works without end on one of four jobs (saving a cache file, adding to a store, adding and compacting,
pulling snapshots) and says what it is about to do and what it has done; after a random moment it is killed with
SIGKILL, and everything that it had said is checked.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import torch

from modeling_xcllama.context_cache import ContextCache
from xcllama.provenance import require_clean, write_result
from xcllama.store import ContextStore, pull

MEASURED = (
    "xcllama/store",
    "xcllama/durable.py",
    "modeling_xcllama/atomic_file.py",
    "modeling_xcllama/context_file.py",
    "scripts/kill_tests.py",
)
WIDTH, NAMES = 16, 20
# a child is killed after fewer operations than these, and so many seconds at most
MOST_OPERATIONS, MOMENTS = 3, 0.1


class Processor:
    """Tokens are UTF-8 bytes."""

    template_version = "1"

    def __call__(self, contexts, padding=False):
        return {"context_input_ids": [list(text.encode()) for text in contexts]}


class Model:
    """The state of a token is its row in a random table, so that any state can be recomputed."""

    def __init__(self):
        self.table = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.dtype, self.device = self.table.dtype, torch.device("cpu")
        self.model = SimpleNamespace(context_fingerprint=lambda: "table")

    def encode_context(self, ids, mask):
        """As XC-Llama's."""
        rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
        offsets = [0]
        for row in rows:
            offsets.append(offsets[-1] + len(row))
        tokens = torch.cat(rows)
        return ContextCache({"hidden": self.table[tokens]}, tuple(offsets), tokens.int(), "table")

    def states(self, text: str) -> torch.Tensor:
        """Of a text."""
        return self.table[torch.tensor(list(text.encode()), dtype=torch.long)]


MODEL, PROCESSOR = Model(), Processor()
Say = Callable[[str, object], None]


class Counts:
    """What was found wrong, and how many operations were acknowledged."""

    def __init__(self):
        self.kills = self.operations = self.lost_commits = self.corrupt_reads = self.bytes_left_over = 0

    def left_over(self, paths: list[Path]) -> None:
        """Count files that nothing needs; an empty one counts, too."""
        self.bytes_left_over += sum(max(1, path.stat().st_size) for path in paths)


def killed(job: Callable[[Path, Say], None], folder: Path, generator: random.Random) -> list[tuple[str, object]]:
    """What a child said that worked on `job` until it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        random.seed(generator.random())
        try:
            job(folder, lambda kind, what: os.write(writing, json.dumps([kind, what]).encode() + b"\n"))
        finally:
            os._exit(1)
    os.close(writing)
    said = os.read(reading, 1 << 20)
    wanted = generator.randrange(MOST_OPERATIONS)
    while said.count(b'["done"') < wanted and (chunk := os.read(reading, 1 << 20)):
        said += chunk
    time.sleep(generator.random() * MOMENTS)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while chunk := os.read(reading, 1 << 20):
        said += chunk
    os.close(reading)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise RuntimeError("the child ended by itself; its traceback stands above.")
    return [tuple(json.loads(line)) for line in said.decode().splitlines()]


# a cache file that is replaced again and again


def cache_of(number: int) -> ContextCache:
    """A cache that bears its number."""
    states = {"hidden": torch.full((4000, 64), float(number % 100))}
    return ContextCache(states, (0, 4000), torch.full((4000,), number, dtype=torch.int32), "table")


def save(folder: Path, say: Say) -> None:
    """Save caches under one name."""
    path, number = folder / "cache.safetensors", 0
    if path.is_file():
        number = int(ContextCache.load(path).token_ids[0])
    while True:
        say("begin", number := number + 1)
        cache_of(number).save(path)
        say("done", number)


def check_save(folder: Path, said: list, counts: Counts, state: dict) -> None:
    """The file is the last that was acknowledged, or the one that was begun."""
    path = folder / "cache.safetensors"
    state["done"] = max([state.get("done", 0), *(number for kind, number in said if kind == "done")])
    if path.is_file():
        try:
            cache = ContextCache.load(path)
            found = int(cache.token_ids[0])
            counts.corrupt_reads += not torch.equal(cache.states["hidden"], cache_of(found).states["hidden"])
        except ValueError:
            counts.corrupt_reads += 1
        else:
            counts.lost_commits += found < state["done"]
    else:
        counts.lost_commits += state["done"] > 0
    # what the next save leaves
    cache_of(state["done"] + 1).save(path)
    state["done"] += 1
    counts.left_over([other for other in folder.iterdir() if other != path])


# a store


def random_text() -> str:
    """Of up to forty words."""
    return f"text {random.random()} " * random.randrange(0, 40)


def store_of(folder: Path, **options) -> ContextStore:
    """A store of many small shards, whose documents are not split."""
    options = {"shard_bytes": 1 << 15, "passage_tokens": None} | options
    return ContextStore(folder, MODEL, PROCESSOR, **options)


def change(folder: Path, say: Say, compacts: float) -> None:
    """Add, change and remove documents, and compact now and then."""
    with store_of(folder) as store:
        while True:
            documents = {f"d{random.randrange(NAMES)}": random_text() for _ in range(random.randrange(1, 6))}
            action = random.random()
            if action < compacts:
                say("begin", {})
                store.compact()
            elif action < compacts + 0.1:
                documents = dict.fromkeys(name for name in documents if name in store)
                say("begin", documents)
                if documents:
                    store.evict(list(documents))
                say("done", documents)
            else:
                say("begin", documents)
                store.add(documents.keys(), documents.values(), progress=False)
                say("done", documents)


def check_store(folder: Path, said: list, counts: Counts, state: dict) -> None:
    """All that was acknowledged is served, what was begun is there or not; the files are those of the catalogue."""
    done, unsure = state.setdefault("done", {}), {}
    for kind, documents in said:
        if kind == "begin":
            unsure = {name: {done.get(name), text} for name, text in documents.items()}
        else:
            done |= documents
            unsure = {}
    with store_of(folder) as store:
        known = {row[0] for row in store.catalogue.rows("SELECT name FROM shards")}
        counts.left_over([path for path in (store.folder / "shards").iterdir() if path.name not in known])
        counts.corrupt_reads += len(store.verify().damaged)
        counts.corrupt_reads += store.catalogue.rows("PRAGMA quick_check") != [("ok",)]
        for name in done.keys() | unsure.keys():
            found = store.catalogue.text(name)
            text = found and found[0]
            counts.lost_commits += text not in unsure.get(name, {done.get(name)})
            done[name] = text
            if text is not None:
                states = store.get(name).states["hidden"]
                counts.corrupt_reads += not torch.equal(states, MODEL.states(text))
        indexed = store.catalogue.rows("SELECT COUNT(*) FROM words WHERE words MATCH 'text'")[0][0]
        counts.corrupt_reads += indexed != sum(bool(text) for text in done.values())


# snapshots that are copied to one place in turns


def snapshots(folder: Path) -> list[Path]:
    """Two snapshots of one store at different times, made if needed."""
    places = [folder.parent / f"snapshot{number}" for number in range(2)]
    if not (places[1] / "manifest.json").is_file():
        with store_of(folder.parent / "source", shard_bytes=1 << 18) as store:
            for number, place in enumerate(places):
                texts = {f"d{name}": f"text {name} {number if name % 3 else ''} " * 30 for name in range(NAMES)}
                store.add(texts.keys(), texts.values(), progress=False)
                store.snapshot(place)
    return places


def pulls(folder: Path, say: Say) -> None:
    """Pull both snapshots in turns."""
    places = snapshots(folder)
    while True:
        for number, place in enumerate(places):
            say("begin", number)
            pull(place, folder)
            say("done", number)


def check_pull(folder: Path, said: list, counts: Counts, state: dict) -> None:
    """What has a manifest is whole, as one of the two; another pull leaves its files and no others."""
    if (folder / "manifest.json").is_file():
        with ContextStore.open(folder, MODEL, PROCESSOR, cache_folder=folder.parent / "cache") as store:
            counts.corrupt_reads += len(store.verify().damaged)
            counts.lost_commits += len(store) != NAMES
    else:
        counts.lost_commits += bool(state.get("pulled"))
    state["pulled"] = True
    manifest = pull(snapshots(folder)[1], folder)
    needed = {"manifest.json", "README.md", *(entry.name for entry in manifest.files)}
    counts.left_over(
        [path for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in needed]
    )


JOBS = {
    "save": (save, check_save),
    "add": (lambda folder, say: change(folder, say, 0.0), check_store),
    "compact": (lambda folder, say: change(folder, say, 0.3), check_store),
    "pull": (pulls, check_pull),
}


def run(name: str, kills: int, seed: int) -> dict[str, int]:
    """Kill a job so many times; returns what was counted."""
    (job, check), counts, generator, state = JOBS[name], Counts(), random.Random(f"{seed}:{name}"), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "work")
        folder.mkdir()
        if name == "pull":
            snapshots(folder)
        for _ in range(kills):
            said = killed(job, folder, generator)
            counts.kills += 1
            counts.operations += sum(kind == "done" for kind, _ in said)
            check(folder, said, counts, state)
    return vars(counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="kills in all, shared by the jobs")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the counts to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    require_clean(arguments.output)
    share = -(-arguments.count // len(arguments.jobs))
    # beside each other: most of the time is waiting for a moment, or for the disk
    with ProcessPoolExecutor(len(arguments.jobs)) as pool:
        counts = pool.map(run, arguments.jobs, repeat(share), repeat(arguments.seed))
        found = dict(zip(arguments.jobs, counts, strict=True))
    print(json.dumps(found))
    if arguments.output:
        write_result(arguments.output, {"jobs": found}, MEASURED, seed=arguments.seed)
    wrong = ("lost_commits", "corrupt_reads", "bytes_left_over")
    return int(any(counts[name] for counts in found.values() for name in wrong))


if __name__ == "__main__":
    sys.exit(main())
