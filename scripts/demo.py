"""Encode documents once, passage by passage, into a context store; then answer from the store in a new process.

A question gets no document named: the store is searched, and the passage found is read from its cache.

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

from xcllama.costs import key_value_bytes
from xcllama.evaluation.metrics import normalize_answer
from xcllama.provenance import require_clean, write_result
from xcllama.store import ContextStore
from xcllama.store.answering import FirstToken, ask

ROOT = Path(__file__).resolve().parent.parent
MAX_NEW_TOKENS = 24
MEASURED = ("modeling_xcllama", "xcllama/store", "scripts/demo.py")


def read_documents(folder: Path) -> list[dict]:
    """The documents, with name, passages and questions; a paragraph is a passage."""
    documents = [{"name": path.stem, **json.loads(path.read_text())} for path in sorted(folder.glob("*.json"))]
    return [document | {"passages": document["text"].split("\n\n")} for document in documents]


def encode(arguments: argparse.Namespace) -> list[dict]:
    """Encode every passage into the store."""
    model, processor = load_model(arguments.checkpoint)
    kv_bytes = key_value_bytes(model.config, model.dtype.itemsize)
    rows = []
    with ContextStore(arguments.store, model, processor) as store:
        for document in read_documents(arguments.passages):
            name, passages = document["name"], document["passages"]
            ids = [f"{name}-{number}" for number in range(1, len(passages) + 1)]
            # the first run warms up
            model.encode_context(**processor(contexts=passages, return_tensors="pt"))
            with store.request() as cost:
                store.add(ids, passages, progress=False)
            cache = store.get(ids)
            rows.append(
                {
                    "document": name,
                    "passages": len(passages),
                    "tokens": cache.num_tokens,
                    "file_bytes": cache.nbytes + cache.token_ids.nbytes,
                    "bytes_per_token": cache.bytes_per_token,
                    "kv_cache_bytes": kv_bytes * cache.num_tokens,
                    "encode_seconds": cost.encode_seconds,
                }
            )
    return rows


def first_token_in_prompt(model, processor, passage: str, question: str) -> float:
    """Seconds to the first token with the passage in the prompt."""
    prompt = processor.prompts([f"{passage}\n\n{question}"])
    inputs = processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    first = FirstToken()
    model.generate(**inputs, max_new_tokens=2, do_sample=False, stopping_criteria=[first])
    return first.seconds


def answer(arguments: argparse.Namespace) -> list[dict]:
    """In a process that never saw the passages' states: search, read from the store, answer, time the first token."""
    model, processor = load_model(arguments.checkpoint)
    store = ContextStore(arguments.store, model, processor, read_only=True)
    documents = read_documents(arguments.passages)
    # the first run warms up
    question = documents[0]["questions"][0][0]
    ask(store, model, processor, question, k=1, max_new_tokens=MAX_NEW_TOKENS)
    first_token_in_prompt(model, processor, documents[0]["passages"][0], question)
    rows = []
    for document in documents:
        answers, costs = [], []
        for question, expected in document["questions"]:
            found = ask(store, model, processor, question, k=1, max_new_tokens=MAX_NEW_TOKENS)
            passage = found.hit.id
            seconds_in_prompt = first_token_in_prompt(model, processor, store.text(passage)[0], question)
            load_seconds = found.cost.search_seconds + found.cost.get_seconds
            costs.append((load_seconds, found.first_token_seconds, seconds_in_prompt))
            right = normalize_answer(expected) in normalize_answer(found.text)
            answers.append(
                {"question": question, "expected": expected, "passage": passage, "answer": found.text, "right": right}
            )
        load, from_cache, in_prompt = zip(*costs, strict=True)
        rows.append(
            {
                "load_seconds": median(load),
                "first_token_from_cache_seconds": median(from_cache),
                "first_token_from_prompt_seconds": median(in_prompt),
                "answers": answers,
            }
        )
    return rows


def print_table(rows: list[dict]) -> None:
    """The figures of every document, and its questions with the answers."""
    print("\ndocument     passages  tokens        file  B/token     KV cache   encode      load  1st token  in prompt")
    for row in rows:
        from_cache, from_prompt = row["first_token_from_cache_seconds"], row["first_token_from_prompt_seconds"]
        print(
            f"{row['document']:12}{row['passages']:>9}{row['tokens']:>8,}{row['file_bytes'] / 1024:>8,.0f} KiB"
            f"{row['bytes_per_token']:>9,.0f}{row['kv_cache_bytes'] / 1024:>9,.0f} KiB{row['encode_seconds']:>7.2f} s"
            f"{1000 * row['load_seconds']:>7.1f} ms{1000 * from_cache:>8.0f} ms{1000 * from_prompt:>8.0f} ms"
        )
    answers = [item for row in rows for item in row["answers"]]
    print()
    for item in answers:
        mark = "right" if item["right"] else f"expected: {item['expected']!r}"
        print(f"{item['question']}\n    -> {item['answer']!r} from {item['passage']} ({mark})")
    right = sum(item["right"] for item in answers)
    print(f"\n{right} of {len(answers)} answers hold what is expected.")


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
    require_clean(arguments.json)
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
        write_result(arguments.json, {"documents": rows}, MEASURED, seed=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
