"""Measure the context store on this machine, each figure beside a raw control in the same run.

python scripts/benchmark_store.py [--json results/store_benchmark.json] [--quick]

Ratios are the throughput of the store over that of the control. Warm: the same tensors, states and token ids of the
documents in the order asked, joined out of two `numpy.memmap`s; of one document views, whose states are then copied.
The control knows where documents lie and checks nothing. Cold: `os.preadv` of the states after the page cache was
dropped (`posix_fadvise`). Writing: the states' bytes in one file with one fsync.
"""

import argparse
import ctypes
import gc
import os
import random
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy
import torch
from load_model import load_model

from modeling_xcllama.context_cache import ContextCache
from xcllama.provenance import require_clean, write_result
from xcllama.store import ContextStore

WIDTH, SEED = 576, 0
MEASURED = ("xcllama/store", "scripts/benchmark_store.py")
WORDS = [f"word{number}" for number in range(20_000)]


def random_corpus(count: int, generator: random.Random) -> tuple[list[str], ContextCache]:
    """`count` documents of 100 to 800 tokens with random 16-bit states."""
    lengths = [generator.randrange(100, 801) for _ in range(count)]
    offsets = tuple(numpy.cumsum([0, *lengths]).tolist())
    states = torch.randn(offsets[-1], WIDTH).to(torch.bfloat16)
    return lengths, ContextCache({"hidden": states}, offsets, torch.zeros(offsets[-1], dtype=torch.int32), "bench")


def drop_cache(paths: list[Path]) -> None:
    """Put files out of the page cache; pages that something maps would stay."""
    gc.collect()
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(function, repeats: int) -> float:
    """Median time of a call."""
    found = []
    for _ in range(repeats):
        begin = perf_counter()
        function()
        found.append(perf_counter() - begin)
    return median(found)


class Bench:
    """A store, and the same states and token ids in two raw files."""

    def __init__(self, folder: Path, documents: int):
        self.generator = random.Random(SEED)
        self.folder = folder
        self.lengths, cache = random_corpus(documents, self.generator)
        self.ids = [f"d{number}" for number in range(documents)]
        self.raw, self.raw_ids = folder / "raw.bin", folder / "raw_ids.bin"
        self.write = self.measure_writes(cache)
        self.offsets = cache.offsets
        self.target = torch.empty(64 * 800, WIDTH, dtype=torch.bfloat16)

    def measure_writes(self, cache: ContextCache) -> dict:
        """Adding all states against writing their bytes with one fsync, in turns; the files of the last turn stay."""
        raw = cache.states["hidden"].view(torch.uint8).numpy().reshape(-1)
        cache.token_ids.numpy().tofile(self.raw_ids)
        ours, control = [], []
        for _ in range(5):
            # both write new files: to write over an old one would find its pages in memory
            self.raw.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "store", ignore_errors=True)
            begin = perf_counter()
            with open(self.raw, "wb") as file:
                file.write(raw.data)
                file.flush()
                os.fsync(file.fileno())
            control.append(perf_counter() - begin)
            with ContextStore(self.folder / "store", fingerprint="bench", dtype="bfloat16") as store:
                begin = perf_counter()
                store.add_cache(self.ids, self.ids, cache)
                ours.append(perf_counter() - begin)
        return {
            "bytes": raw.nbytes,
            "store_megabytes_per_second": raw.nbytes / median(ours) / 1e6,
            "raw_megabytes_per_second": raw.nbytes / median(control) / 1e6,
            "ratio": median(raw / own for raw, own in zip(control, ours, strict=True)),
        }

    def requests(self, size: int, count: int) -> list[list[int]]:
        """Random sets of neighbours' numbers: what a search may give has no order."""
        return [self.generator.sample(range(len(self.ids)), size) for _ in range(count)]

    def read_raw(self, maps: list[tuple[numpy.ndarray, torch.Tensor]], request: list[int]) -> None:
        """The control, the quickest way there is: views of one document, else copies joined by numpy, as tensors.

        Args:
            maps: of states and token ids: the map, a row a token, and its tensor.
            request: numbers of documents.
        """
        spans = [(self.offsets[number], self.offsets[number + 1]) for number in request]
        if len(spans) == 1:
            ((start, end),) = spans
            states, _ = [tensor[start:end] for _, tensor in maps]
            self.target[: end - start].copy_(states)
        else:
            for rows, tensor in maps:
                torch.from_numpy(numpy.concatenate([rows[start:end] for start, end in spans])).view(tensor.dtype)

    def read_store(self, store: ContextStore, request: list[int]) -> None:
        """One `get`: a copy into new memory where documents are joined; of one document a view, which is copied."""
        cache = store.get([self.ids[number] for number in request])
        if len(request) == 1:
            self.target[: cache.offsets[-1]].copy_(cache.states["hidden"])

    def warm(self, size: int, count: int) -> dict:
        """Requests of `size` documents, all read before, from the store and from memory maps, in turns."""
        states = numpy.asarray(numpy.memmap(self.raw, numpy.uint8, "c")).reshape(-1, 2 * WIDTH)
        ids = numpy.asarray(numpy.memmap(self.raw_ids, numpy.int32, "c"))
        maps = [(states, torch.from_numpy(states).view(torch.bfloat16)), (ids, torch.from_numpy(ids))]
        times: dict[str, list[float]] = {"store": [], "raw": []}
        with ContextStore(self.folder / "store") as store:
            reads = {
                "store": lambda request: self.read_store(store, request),
                "raw": lambda request: self.read_raw(maps, request),
            }
            for number in range(len(self.ids)):
                reads["store"]([number]), reads["raw"]([number])
            for turn, request in enumerate(self.requests(size, count)):
                for name in ("store", "raw") if turn % 2 else ("raw", "store"):
                    times[name].append(seconds_of(lambda read=reads[name], request=request: read(request), 1))
        return {
            "store_microseconds": 1e6 * median(times["store"]),
            "raw_microseconds": 1e6 * median(times["raw"]),
            "ratio": median(raw / own for raw, own in zip(times["raw"], times["store"], strict=True)),
        }

    def cold(self, size: int, count: int) -> dict:
        """First reads from the disk, checksums included, against `preadv` of the same documents."""
        shards = list((self.folder / "store").rglob("*.safetensors"))
        ours = control = 0.0
        descriptor, store = os.open(self.raw, os.O_RDONLY), ContextStore(self.folder / "store", read_only=True)
        target = self.target.view(torch.uint8).numpy()
        for request in self.requests(size, count):
            drop_cache([self.raw, *shards])
            begin = perf_counter()
            position = 0
            for number in request:
                start, end = self.offsets[number], self.offsets[number + 1]
                part = target[position : position + end - start]
                os.preadv(descriptor, [part.reshape(-1).data], start * 2 * WIDTH)
                position += end - start
            control += perf_counter() - begin
            # open, as the control's file is
            numbers = [row[0] for row in store.catalogue.rows("SELECT shard FROM shards")]
            for shard in numbers:
                store._reader.forget(shard)
            drop_cache(shards)
            for shard in numbers:
                store._reader.shard(shard)
            begin = perf_counter()
            self.read_store(store, request)
            ours += perf_counter() - begin
        os.close(descriptor)
        store.close()
        return {"store_seconds": ours, "raw_seconds": control, "ratio": control / ours}


def measure_search(folder: Path, count: int) -> dict:
    """Searching among many documents of 60 words with Zipf's frequencies, and finding one by its id."""
    generator = random.Random(SEED)
    weights = [1 / (rank + 1) for rank in range(len(WORDS))]
    with ContextStore(folder, fingerprint="bench", dtype="bfloat16") as store:
        for start in range(0, count, 10_000):
            number = min(10_000, count - start)
            texts = [" ".join(generator.choices(WORDS, weights, k=60)) for _ in range(number)]
            cache = ContextCache(
                {"hidden": torch.zeros(number, 8, dtype=torch.bfloat16)},
                tuple(range(number + 1)),
                torch.zeros(number, dtype=torch.int32),
                "bench",
            )
            store.add_cache([f"d{start + index}" for index in range(number)], texts, cache)
        store.compact()
        queries = ["what is the " + " ".join(generator.choices(WORDS, weights, k=4)) for _ in range(200)]
        times = sorted(seconds_of(lambda query=query: store.search(query, k=4), 1) for query in queries)
        names = [f"d{generator.randrange(count)}" for _ in range(2000)]
        lookups = sorted(seconds_of(lambda name=name: store.catalogue.locate(name), 1) for name in names)
    return {
        "documents": count,
        "median_milliseconds": 1e3 * median(times),
        "p95_milliseconds": 1e3 * times[189],
        "lookup_median_microseconds": 1e6 * median(lookups),
        "lookup_p99_microseconds": 1e6 * lookups[1979],
        "catalogue_bytes_per_document": store.catalogue.path.stat().st_size / count,
    }


def resident_bytes() -> int:
    """Bytes of memory of this process that belong to it alone."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * (int(fields["RssAnon"].split()[0]))


def measure_memory(folder: Path, small: int) -> dict:
    """Memory of adding and reading while the corpus grows a hundredfold; "used": without freed memory that is kept."""
    resident, used, trim = {}, {}, ctypes.CDLL("libc.so.6").malloc_trim
    with ContextStore(folder, fingerprint="bench", dtype="bfloat16") as store:
        done = 0
        for count in (small, 10 * small, 100 * small):
            while done < count:
                number = min(100, count - done)
                cache = ContextCache(
                    {"hidden": torch.randn(number * 64, 64).to(torch.bfloat16)},
                    tuple(range(0, number * 64 + 1, 64)),
                    torch.zeros(number * 64, dtype=torch.int32),
                    "bench",
                )
                ids = [f"d{done + index}" for index in range(number)]
                store.add_cache(ids, ids, cache)
                done += number
                store.get(ids[:8])
            resident[str(count)] = resident_bytes()
            trim(0)
            used[str(count)] = resident_bytes()
    last, first = str(100 * small), str(small)
    return {
        "resident_bytes_by_documents": resident,
        "used_bytes_by_documents": used,
        "resident_growth": resident[last] / resident[first],
        "growth": used[last] / used[first],
        "bytes_per_document": (used[last] - used[first]) / (99 * small),
    }


def measure_first_token(folder: Path, name: str | None) -> dict:
    """Time to the first token from a document of the store and from a bare cache file, in turns."""
    model, processor = load_model(name)
    text = "The lighthouse on the northern cape was built by Anna Berg in 1871 and rebuilt after the storm. " * 12
    inputs = processor(text=["Who built the lighthouse?"], return_tensors="pt")
    with ContextStore(folder / "store", model, processor) as store, torch.no_grad():
        store.add("lighthouse", text)
        path = folder / "bare.safetensors"
        store.get("lighthouse").save(path)

        def first(cache: ContextCache) -> None:
            model(**inputs, context_cache=cache, logits_to_keep=1).logits.argmax().item()

        ours, control = [], []
        for _ in range(12):
            control.append(seconds_of(lambda: first(model.load_context(path)), 1))
            ours.append(seconds_of(lambda: first(store.get("lighthouse")), 1))
    return {
        "store_seconds": median(ours[2:]),
        "bare_file_seconds": median(control[2:]),
        "store_over_bare_file": median(ours[2:]) / median(control[2:]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="a tenth of the sizes, to try the script")
    parser.add_argument("--model", help="for the first token; default: the repository's checkpoint")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary folder")
    parser.add_argument("--only", nargs="+", help="names of measurements; default: all")
    arguments = parser.parse_args()
    require_clean(arguments.json)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    scale = 10 if arguments.quick else 1
    figures: dict = {"load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        bench = Bench(folder, 2000 // scale)
        measurements = {
            "write": lambda: bench.write,
            "warm": lambda: {str(size): bench.warm(size, 1600 // size // scale + 10) for size in (1, 8, 64)},
            "cold": lambda: {str(size): bench.cold(size, 30 // scale) for size in (1, 8, 64)},
            "first_token": lambda: measure_first_token(folder / "first", arguments.model),
            "memory": lambda: measure_memory(folder / "memory", 1000 // scale),
            "search": lambda: measure_search(folder / "search", 200_000 // scale),
        }
        for name in arguments.only or measurements:
            figures[name] = measurements[name]()
            print(name, figures[name], flush=True)
            figures["peak_memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if arguments.json:
                write_result(arguments.json, figures, MEASURED, seed=SEED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
