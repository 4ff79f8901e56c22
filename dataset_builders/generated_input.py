"""Files of random words in the official formats, of any size: input for benchmarks.

Field names, nesting and typical lengths are those of the official files.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

FILES = {
    "squad_v2": "squad.json",
    "hotpotqa": "hotpotqa.json",
    "topiocqa": "topiocqa.json",
    "msmarco": "msmarco.json.gz",
    "natural_questions": "nq.jsonl.gz",
}
WORDS = [f"{a}{b}{c}" for a in "bdfglmnprst" for b in "aeiou" for c in ("", "n", "rd", "st", "ling")]


def words(generator: random.Random, count: int) -> str:
    return " ".join(generator.choices(WORDS, k=count))


def squad_articles(generator: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Articles of 5 paragraphs with 4 questions each."""
    for number in range(count):
        paragraphs = []
        for index in range(5):
            context = words(generator, 120)
            answer = {"text": context[:12], "answer_start": 0}
            questions = [
                {"id": f"{number}-{index}-{q}", "question": words(generator, 10), "is_impossible": q == 3,
                 "answers": [] if q == 3 else [answer]}
                for q in range(4)
            ]  # fmt: skip
            paragraphs.append({"context": context, "qas": questions})
        yield {"title": f"Page_{number}", "paragraphs": paragraphs}


def hotpotqa_questions(generator: random.Random, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        context = [[f"Page {number} {p}", [f" {words(generator, 20)}." for _ in range(4)]] for p in range(10)]
        facts = [[context[0][0], 0], [context[3][0], 1]]
        yield {"_id": f"{number:08x}", "question": words(generator, 15), "answer": words(generator, 2),
               "type": "bridge", "level": "hard", "supporting_facts": facts, "context": context}  # fmt: skip


def topiocqa_turns(generator: random.Random, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        turn = number % 12
        yield {"Conversation_no": number // 12, "Turn_no": turn + 1, "Question": words(generator, 7),
               "Answer": words(generator, 8), "Topic": "t", "Topic_section": "s", "Rationale": "", "is_nq": False,
               "Context": [words(generator, 7) for _ in range(2 * turn)], "Additional_answers": [],
               "Gold_passage": {"id": str(number), "title": f"Page {number // 4}",
                                "text": words(generator, 100)}}  # fmt: skip


def natural_questions(generator: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Pages of 3,000 tokens; the official ones are longer still."""
    for number in range(count):
        tokens = [{"token": t, "html_token": False, "start_byte": i, "end_byte": i + 1}
                  for i, t in enumerate(generator.choices(WORDS, k=3000))]  # fmt: skip
        span = {"start_token": 40, "end_token": 150, "start_byte": 40, "end_byte": 150}
        yield {"example_id": number, "question_text": words(generator, 9), "document_title": f"Page {number}",
               "document_url": "https://en.wikipedia.org/", "document_html": "", "document_tokens": tokens,
               "question_tokens": [], "long_answer_candidates": [span | {"top_level": True}],
               "annotations": [{"annotation_id": 1, "yes_no_answer": "NONE",
                                "long_answer": span | {"candidate_index": 0},
                                "short_answers": [span | {"start_token": 50, "end_token": 53}]}]}  # fmt: skip


def msmarco_columns(generator: random.Random, count: int) -> dict[str, Callable[[int], Any]]:
    def passages(number: int) -> list[dict[str, Any]]:
        return [{"is_selected": int(p == 2), "passage_text": words(generator, 60), "url": ""} for p in range(10)]

    return {"answers": lambda number: [words(generator, 12)], "passages": passages,
            "query": lambda number: words(generator, 6), "query_id": lambda number: number,
            "query_type": lambda number: "DESCRIPTION", "wellFormedAnswers": lambda number: "[]"}  # fmt: skip


def write_list(stream: TextIO, items: Iterator[Any]) -> None:
    for index, item in enumerate(items):
        stream.write(("," if index else "") + json.dumps(item) + "\n")


def generate(name: str, path: Path, scale: int) -> None:
    """Write input of source `name` (a key of `FILES`) to `path`: `scale` times 20 to 1,000 questions."""
    generator = random.Random(f"{name}:{scale}")
    with gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else path.open("w") as stream:
        if name == "squad_v2":
            stream.write('{"version": "v2.0", "data": [')
            write_list(stream, squad_articles(generator, 50 * scale))
            stream.write("]}")
        elif name == "natural_questions":
            for record in natural_questions(generator, 20 * scale):
                stream.write(json.dumps(record) + "\n")
        elif name == "msmarco":
            for index, (column, value) in enumerate(msmarco_columns(generator, scale).items()):
                stream.write(("{" if index == 0 else ", ") + json.dumps(column) + ": {")
                for number in range(200 * scale):
                    stream.write(("," if number else "") + json.dumps(str(number)) + ": " + json.dumps(value(number)))
                stream.write("}")
            stream.write("}")
        else:
            items = {"hotpotqa": hotpotqa_questions, "topiocqa": topiocqa_turns}[name]
            stream.write("[")
            write_list(stream, items(generator, 200 * scale))
            stream.write("]")
