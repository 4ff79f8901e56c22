"""Encode passages once, then answer questions about them from the cache file in a new process.

python scripts/demo.py [--json FILE] [--checkpoint FOLDER] [--passages FOLDER]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from load_model import load_model
from transformers.generation.streamers import BaseStreamer

from dataset_builders.provenance import write_result

ROOT = Path(__file__).resolve().parent.parent


class FirstToken(BaseStreamer):
    """Notes when the first new token arrives; `generate` sends the prompt first."""

    def __init__(self):
        self.start, self.seconds, self.calls = time.perf_counter(), None, 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.seconds = time.perf_counter() - self.start

    def end(self) -> None:
        """Nothing to close."""


def read_passages(folder: Path) -> list[dict]:
    """The passages, with name, title, text and questions."""
    return [{"name": path.stem, **json.loads(path.read_text())} for path in sorted(folder.glob("*.json"))]


def timed(function: Callable, repeats: int = 3) -> tuple[float, object]:
    """Median seconds of `repeats` calls, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return median(seconds), result


def encode(arguments: argparse.Namespace) -> list[dict]:
    """Encode every passage into a cache file of its own."""
    model, processor = load_model(arguments.checkpoint)
    config = model.config
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    rows = []
    for passage in read_passages(arguments.passages):
        inputs = processor(contexts=[passage["text"]], return_tensors="pt")
        model.encode_context(**inputs)
        seconds, cache = timed(lambda inputs=inputs: model.encode_context(**inputs))
        path = arguments.caches / f"{passage['name']}.safetensors"
        cache.save(path)
        tokens = cache.num_tokens
        rows.append(
            {
                "passage": passage["name"],
                "tokens": tokens,
                "file_bytes": path.stat().st_size,
                "bytes_per_token": cache.bytes_per_token,
                "kv_cache_bytes": kv_bytes * tokens,
                "encode_seconds": seconds,
            }
        )
    return rows


def first_token_seconds(model, inputs: dict, repeats: int = 3, **options) -> float:
    """Median time from the call of `generate` to its first token."""
    seconds = []
    for _ in range(repeats + 1):
        streamer = FirstToken()
        model.generate(**inputs, **options, max_new_tokens=2, do_sample=False, streamer=streamer)
        seconds.append(streamer.seconds)
    # the first run warms up
    return median(seconds[1:])


def answer(arguments: argparse.Namespace) -> list[dict]:
    """In a process that never saw the passages' states: load each cache file, answer, and time the first token."""
    model, processor = load_model(arguments.checkpoint)
    tokenizer = processor.tokenizer
    rows = []
    for passage in read_passages(arguments.passages):
        path = arguments.caches / f"{passage['name']}.safetensors"
        load_seconds, cache = timed(lambda path=path: model.load_context(path))
        questions = [question for question, _ in passage["questions"]]
        inputs = processor(text=questions, return_tensors="pt")
        options = {"max_new_tokens": 24, "do_sample": False}
        generated = model.generate(**inputs, context_cache=cache.select([0] * len(questions)), **options)
        answers = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        single = processor(text=questions[:1], return_tensors="pt")
        prompt = processor.prompts([f"{passage['text']}\n\n{questions[0]}"])
        in_prompt = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        rows.append(
            {
                "load_seconds": load_seconds,
                "first_token_from_cache_seconds": first_token_seconds(model, single, context_cache=cache),
                "first_token_from_prompt_seconds": first_token_seconds(model, in_prompt),
                "answers": [
                    {"question": question, "expected": expected, "answer": text.strip()}
                    for (question, expected), text in zip(passage["questions"], answers, strict=True)
                ],
            }
        )
    return rows


def print_table(rows: list[dict]) -> None:
    """The figures of every passage, and its questions with the answers."""
    print("\npassage       tokens        file  B/token     KV cache   encode      load  1st token  in prompt")
    for row in rows:
        from_cache, from_prompt = row["first_token_from_cache_seconds"], row["first_token_from_prompt_seconds"]
        print(
            f"{row['passage']:12}{row['tokens']:>8,}{row['file_bytes'] / 1024:>8,.0f} KiB"
            f"{row['bytes_per_token']:>9,.0f}{row['kv_cache_bytes'] / 1024:>9,.0f} KiB{row['encode_seconds']:>7.2f} s"
            f"{1000 * row['load_seconds']:>7.1f} ms{1000 * from_cache:>8.0f} ms{1000 * from_prompt:>8.0f} ms"
        )
    for row in rows:
        print(f"\n{row['passage']}")
        for item in row["answers"]:
            print(f"  {item['question']}\n    -> {item['answer']!r}   (expected: {item['expected']!r})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--checkpoint", help="folder of added weights, model folder or Hub id; 'untrained'")
    parser.add_argument("--passages", type=Path, default=ROOT / "scripts" / "passages")
    parser.add_argument("--caches", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.caches is not None:
        # the second process: read the cache files, report on stdout
        print(json.dumps(answer(arguments)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        arguments.caches = Path(folder)
        rows = encode(arguments)
        print("Encoded and saved; a new process now answers from the cache files.")
        command = [sys.executable, __file__, "--caches", folder, "--passages", str(arguments.passages)]
        command += [] if arguments.checkpoint is None else ["--checkpoint", arguments.checkpoint]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows = [row | read for row, read in zip(rows, json.loads(output.splitlines()[-1]), strict=True)]
    print_table(rows)
    if arguments.json:
        write_result(arguments.json, {"passages": rows}, seed=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
