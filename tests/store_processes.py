"""Writers and readers in processes of their own, for test_store_faults.py.

`python store_processes.py` imports once, then forks a process for each line `[role, folder, ...]` on its input.
"""

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from store_support import TableModel, row_states, whole_store

from xcllama.store import ContextStore, MissingDocumentError

MODEL = TableModel()


def writer(folder: str, number: int, seconds: float) -> None:
    """Add documents of its own and change shared ones; print what it made last."""
    generator = random.Random(number)
    own: dict[str, str] = {}
    end = time.time() + seconds
    with whole_store(folder, MODEL, max_bytes=3_000_000) as store:
        step = 0
        while time.time() < end:
            documents = {
                f"w{number}-{step % 30}": f"writer {number} step {step}",
                "shared": f"by {number} {step}" * 20,
            }
            store.add(documents.keys(), documents.values())
            own |= documents
            step += 1
            if generator.random() < 0.1:
                store.compact()
            if generator.random() < 0.1:
                gone = generator.choice([name for name in own if name != "shared"])
                store.evict(gone)
                del own[gone]
    own.pop("shared")
    print(json.dumps(own))


def reader(folder: str, number: int, seconds: float) -> None:
    """Read what there is: states must be those of one text that a writer gave, whole."""
    generator, reads, misses = random.Random(number), 0, 0
    end = time.time() + seconds
    with ContextStore(folder, read_only=True) as store:
        while time.time() < end:
            ids = generator.sample([f"w{w}-{i}" for w in range(2) for i in range(30)], 3) + ["shared"]
            try:
                cache = store.get(ids)
            except MissingDocumentError:
                misses += 1
                continue
            for row, name in enumerate(ids):
                text = bytes(cache.row_token_ids(row).tolist()).decode()
                start = "by " if name == "shared" else f"writer {name[1]} step "
                assert text.startswith(start), (name, text)
                assert torch.equal(row_states(cache, row), MODEL.states(text))
            for hit in store.search("writer step", k=3):
                assert hit.snippet.startswith("writer"), hit
            reads += 1
    print(json.dumps({"reads": reads, "misses": misses}))


def crowd(folder: str, seconds: float) -> None:
    """Two writers and eight readers at once, each a process; prints what each printed."""
    whole_store(folder, MODEL).close()
    children = []
    for number in range(10):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writing, 1)
            try:
                (writer if number < 2 else reader)(folder, number, seconds)
                sys.stdout.flush()
                os._exit(0)
            except BaseException as error:
                print(json.dumps({"error": repr(error)}), flush=True)
                os._exit(1)
        os.close(writing)
        children.append((child, reading))
    results = []
    for child, reading in children:
        with os.fdopen(reading) as file:
            results.append(json.loads(file.read().splitlines()[-1]))
        os.waitpid(child, 0)
    print(json.dumps(results))


def add_one(folder: str) -> None:
    """A store that exists gets one more document, under the eyes of a tracer."""
    with whole_store(folder, MODEL) as store:
        Path(folder + ".pid").write_text(str(os.getpid()))
        end = time.time() + 30
        while "TracerPid:\t0" in Path("/proc/self/status").read_text() and time.time() < end:
            time.sleep(0.01)
        store.add("new", "a new document")


def full_disk(folder: str, limit: int) -> None:
    """Add until files may not grow any more (`RLIMIT_FSIZE`, or a small file system with limit 0)."""
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    failures = 0
    with whole_store(folder, MODEL) as store:
        step = 0
        while failures < 3 and step < 200:
            text = f"document {step} " + "x" * (300 * step)
            try:
                store.add(f"d{step}", text)
            except OSError:
                failures += 1
                if f"d{step}" in store:
                    sys.exit(f"d{step} was not written, and is there")
            else:
                assert torch.equal(row_states(store.get(f"d{step}"), 0), MODEL.states(text))
            step += 1
        assert failures == 3, step
        assert store.verify().damaged == []
        print(json.dumps({"documents": len(store), "steps": step}))


def read_only(folder: str) -> None:
    """Serve from a folder that this user cannot write."""
    os.setgid(65534)
    os.setuid(65534)
    with whole_store(folder, MODEL) as store:
        states = row_states(store.get("a"), 0)
        found = [hit.id for hit in store.search("lighthouse")]
        refused = []
        for action in (
            lambda: store.add("b", "text"),
            lambda: store.evict("a"),
            lambda: store.pin("a"),
            store.compact,
        ):
            try:
                action()
            except ValueError as error:
                refused.append(str(error))
        try:
            whole_store(folder, MODEL, read_only=False)
        except ValueError as error:
            refused.append(str(error))
        print(
            json.dumps({"same": torch.equal(states, MODEL.states("a lighthouse")), "hits": found, "refused": refused})
        )


def serve() -> None:
    """Fork a process for each request; answer with its exit status and what it printed."""
    for line in sys.stdin:
        role, *arguments = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            status = 1
            try:
                ROLES[role](*arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        os.close(writing)
        with os.fdopen(reading) as file:
            output = file.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, output]), flush=True)


ROLES = {"crowd": crowd, "add_one": add_one, "full_disk": full_disk, "read_only": read_only}

if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
