"""Many visitors at once: memory of the Space's process, errors, and what a visitor waits.

python scripts/benchmark_space.py [--json results/space_load.json] [--visitors 20] [--seconds 60] [--model NAME]

Visitors talk HTTP to the Space as browsers do, from this machine, so they take part of its processors. Each adds a
text of its own, then asks, switches documents off and on, now and then compares with the text in the prompt or adds
another text; it waits one to three seconds between actions. Latencies are a visitor's: waiting for others is in them.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from math import ceil
from pathlib import Path
from statistics import median

from gradio_client import Client

from xcllama.provenance import require_clean, write_result
from xcllama.publishing.running_space import served

MEASURED = ("modeling_xcllama", "space", "scripts/benchmark_space.py")
ROOT = Path(__file__).resolve().parent.parent
SEED = 0
PATIENCE = 300
FILLER = "The {thing} stands beside the old road, and people come from far away to see it in the summer. "
THINGS = ("mill", "tower", "bridge", "garden", "well", "school", "market", "chapel")


class Load:
    """What the visitors met: seconds by action, errors, and documents of others that were seen."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.errors: list[str] = []
        self.leaks = 0
        self._lock = threading.Lock()

    def timed(self, action: str, call) -> object:
        """Run one action of a visitor; an error is counted and raised."""
        start = time.perf_counter()
        try:
            result = call()
        except Exception as error:
            with self._lock:
                self.errors.append(f"{action}: {type(error).__name__}: {error}")
            raise
        with self._lock:
            self.seconds[action].append(time.perf_counter() - start)
        return result

    def table(self) -> dict:
        """Count, median, 95th percentile and maximum by action."""
        return {
            action: {
                "count": len(values),
                "median_seconds": median(values),
                "p95_seconds": sorted(values)[ceil(0.95 * len(values)) - 1],
                "max_seconds": max(values),
            }
            for action, values in sorted(self.seconds.items())
        }


class LoadVisitor:
    """One visitor, with a word that stands in its documents only."""

    def __init__(self, url: str, number: int, load: Load):
        self.mark = f"visitor{number:03d}x"
        self.load, self.random = load, random.Random(f"{SEED} {number}")
        self.client = load.timed("open the page", lambda: Client(url, verbose=False, analytics_enabled=False))
        self.names: list[str] = []

    def run(self, deadline: float) -> None:
        """Act until the deadline; what was begun is finished."""
        try:
            self.add()
            while time.perf_counter() < deadline:
                time.sleep(self.random.uniform(1, 3))
                action = self.random.choices((self.ask, self.toggle, self.compare, self.add), (6, 3, 2, 1))[0]
                action()
        # counted where it happened
        except Exception:
            return
        finally:
            self.client.close()

    def predict(self, action: str, *values, api_name: str) -> object:
        """Call an endpoint and wait for its last state."""
        return self.load.timed(action, lambda: self.client.submit(*values, api_name=api_name).result(timeout=PATIENCE))

    def add(self) -> None:
        """Add a text of 100 to 500 words, at most four."""
        if len(self.names) == 4:
            self.predict("remove", self.names, api_name="/remove")
            self.names = []
        thing = self.random.choice(THINGS)
        text = f"The code of the {thing} is {self.mark}. " + FILLER.format(thing=thing) * self.random.randrange(5, 25)
        status, chosen, *_ = self.predict("add a text", self.mark, text, self.names, api_name="/add_text")
        if "encoded" not in status:
            self.load.errors.append(f"add a text: {status}")
        self.names = chosen["value"]

    def ask(self) -> None:
        """Ask, note when the first part of the answer came, and look for what belongs to others."""

        def call() -> tuple:
            start = time.perf_counter()
            job = self.client.submit("What is the code?", self.names, api_name="/ask")
            while not job.done() and not job.outputs():
                time.sleep(0.01)
            self.load.seconds["first words of an answer"].append(time.perf_counter() - start)
            return job.result(timeout=PATIENCE)

        _, figures, _, places, *_ = self.load.timed("answer from the cache", call)
        if "first token" not in figures or self.mark not in places:
            self.load.errors.append(f"answer from the cache: {figures}")
        self.load.leaks += places.count("visitor") - places.count(self.mark)

    def compare(self) -> None:
        """Ask with the text in the prompt."""
        self.predict("answer from the prompt", "What is the code?", self.names[:1], True, api_name="/ask_prompt")

    def toggle(self) -> None:
        """Switch the first document off and on again."""
        for chosen in (self.names[1:], self.names):
            self.predict("switch a document", chosen, api_name="/toggle")


class Memory:
    """The memory of a process over time."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.samples = process, []

    def now(self) -> int:
        """Bytes of memory that belong to the process alone."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

    def watch(self, stop: threading.Event) -> None:
        """Sample the memory twice a second."""
        while not stop.wait(0.5):
            self.samples.append(self.now())


def measure(url: str, memory: Memory, visitors: int, seconds: float) -> dict:
    """Let the visitors in, all at once, and wait for the last."""
    load, stop = Load(), threading.Event()
    before = memory.now()
    memory.samples.clear()
    watcher = threading.Thread(target=memory.watch, args=(stop,))
    watcher.start()
    start = time.perf_counter()
    deadline = start + seconds

    def visit(number: int) -> None:
        LoadVisitor(url, number, load).run(deadline)

    threads = [threading.Thread(target=visit, args=(number,), daemon=True) for number in range(visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=max(0.1, deadline + PATIENCE - time.perf_counter()))
    unfinished = sum(thread.is_alive() for thread in threads)
    took = time.perf_counter() - start
    stop.set()
    watcher.join()
    half = len(memory.samples) // 2
    return {
        "visitors": visitors,
        "seconds_of_load": seconds,
        "seconds_until_the_last_answer": took,
        "errors": len(load.errors),
        "error_texts": load.errors[:10],
        "unfinished_visitors": unfinished,
        "texts_of_others_seen": load.leaks,
        "actions": load.table(),
        "memory_bytes": {
            "before": before,
            "peak_in_the_first_half": max(memory.samples[:half]),
            "peak_in_the_second_half": max(memory.samples[half:]),
            "after": memory.now(),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--model", help="as in run_space.py; default: the repository's checkpoint")
    arguments = parser.parse_args()
    require_clean(arguments.json)
    command = [sys.executable, str(ROOT / "scripts" / "run_space.py")]
    command += [] if arguments.model is None else ["--model", arguments.model]
    with (
        tempfile.TemporaryDirectory() as folder,
        served(command, dict(os.environ), Path(folder) / "log") as (url, process),
    ):
        memory, figures = Memory(process), {"load_average": os.getloadavg()[0]}
        # the first request warms up
        measure(url, memory, 1, 1)
        figures |= measure(url, memory, arguments.visitors, arguments.seconds)
    print(figures)
    if arguments.json:
        write_result(arguments.json, figures, MEASURED, seed=SEED)
    return 1 if figures["errors"] or figures["unfinished_visitors"] or figures["texts_of_others_seen"] else 0


if __name__ == "__main__":
    sys.exit(main())
