"""Encode passages once into a context store, then answer questions about them from the store in a new process.

python scripts/demo.py [--json FILE] [--checkpoint FOLDER] [--passages FOLDER]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from load_model import load_model

from context_store import ContextStore
from context_store.answering import FirstToken
from dataset_builders.provenance import write_result

ROOT = Path(__file__).resolve().parent.parent


def read_passages(folder: Path) -> list[dict]:
    """The passages, with name, title, text and questions."""
    return [{"name": path.stem, **json.loads(path.read_text())} for path in sorted(folder.glob("*.json"))]


def encode(arguments: argparse.Namespace) -> list[dict]:
    """Encode every passage into the store."""
    model, processor = load_model(arguments.checkpoint)
    config = model.config
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    rows = []
    with ContextStore(arguments.store, model, processor) as store:
        for passage in read_passages(arguments.passages):
            name, text = passage["name"], passage["text"]
            # the first run warms up
            model.encode_context(**processor(contexts=[text], return_tensors="pt"))
            with store.request() as cost:
                store.add(name, text, progress=False)
            cache = store.get(name)
            rows.append(
                {
                    "passage": name,
                    "tokens": cache.num_tokens,
                    "file_bytes": cache.nbytes + cache.token_ids.nbytes,
                    "bytes_per_token": cache.bytes_per_token,
                    "kv_cache_bytes": kv_bytes * cache.num_tokens,
                    "encode_seconds": cost.encode_seconds,
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
    """In a process that never saw the passages' states: read each from the store, answer, time the first token."""
    model, processor = load_model(arguments.checkpoint)
    tokenizer = processor.tokenizer
    rows = []
    store = ContextStore(arguments.store, model, processor, read_only=True)
    for passage in read_passages(arguments.passages):
        with store.request() as cost:
            cache = store.get(passage["name"])
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
                "load_seconds": cost.get_seconds,
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
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.store is not None:
        # the second process: read the store, report on stdout
        print(json.dumps(answer(arguments)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        arguments.store = Path(folder)
        rows = encode(arguments)
        print("Encoded into a store; a new process now answers from it.")
        command = [sys.executable, __file__, "--store", folder, "--passages", str(arguments.passages)]
        command += [] if arguments.checkpoint is None else ["--checkpoint", arguments.checkpoint]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows = [row | read for row, read in zip(rows, json.loads(output.splitlines()[-1]), strict=True)]
    print_table(rows)
    if arguments.json:
        write_result(arguments.json, {"passages": rows}, seed=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
