"""The row schema that every source is brought to, and its checks.

A row is one question of one source:

    sample_idx       id of the question in its source, unique within `dataset`
    dataset          name of the source, a key of `SOURCES`
    titles_list      one title for each context, "" where the source has none
    contexts_list    whole texts, never cut
    useful_contexts  indices into `contexts_list`: what the answer rests on (empty: nothing, or not known)
    question         the question of this turn ("" for plain text)
    history          earlier turns of the conversation, oldest first
    answer           the reference answer; `NO_ANSWER` where the contexts hold none; "" for plain text
    answers          all accepted answers, `answer` first
    answerable       whether the contexts hold an answer
    question_type    what the source or the task calls this kind of question, "" where it does not say
"""

import re
from dataclasses import dataclass, field
from typing import Any

NO_ANSWER = "UNANSWERABLE"

Row = dict[str, Any]

FIELDS = (
    "sample_idx", "dataset", "titles_list", "contexts_list", "useful_contexts", "question", "history", "answer",
    "answers", "answerable", "question_type",
)  # fmt: skip

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_STRINGS = ("sample_idx", "dataset", "question", "answer", "question_type")
_STRING_LISTS = ("titles_list", "contexts_list", "answers")


# why a question is dropped whose answer is blank, or missing where its source does not say that there is none
NONE_GIVEN = "no answer given"


class RecordError(ValueError):
    """A record of a source that breaks the source's format; `field` says where in the record."""

    def __init__(self, field: str, message: str):
        super().__init__(f"`{field}` {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple:
        # errors travel from worker processes
        return RecordError, (self.field, self.message)

    @property
    def reason(self) -> str:
        """What it is counted under: field and rule, without indices and values."""
        rule = re.split(r"[,:;(]| at ", self.message)[0]
        field = re.sub(r"\[\d+\]", "[]", self.field)
        return f"`{field}` {rule.strip()}"


@dataclass(frozen=True)
class Drop:
    """A question that is left out, and why."""

    reason: str


@dataclass(frozen=True)
class Repair:
    """Something bad that is left out of a question that stays, and why."""

    reason: str


ERROR = "error: "


@dataclass
class Report:
    """What became of the questions of a source: `read == kept + sum(dropped.values())`.

    Args:
        dropped: reason -> questions left out; those that could not be read have reasons that start with "error: ".
        repaired: reason -> what was left out of questions that stay, or changed in them.
    """

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Questions and records that could not be read."""
        return sum(count for reason, count in self.dropped.items() if reason.startswith(ERROR))

    def keep(self, count: int = 1) -> None:
        self.read += count
        self.kept += count

    def drop(self, reason: str, count: int = 1) -> None:
        self.read += count
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def repair(self, reason: str, count: int = 1) -> None:
        self.repaired[reason] = self.repaired.get(reason, 0) + count

    def add(self, other: "Report") -> None:
        self.keep(other.kept)
        for reason, count in other.dropped.items():
            self.drop(reason, count)
        for reason, count in other.repaired.items():
            self.repair(reason, count)

    def as_dict(self) -> dict[str, Any]:
        tables = {"dropped": dict(sorted(self.dropped.items())), "repaired": dict(sorted(self.repaired.items()))}
        return {"read": self.read, "kept": self.kept} | tables


def make_row(
    dataset: str,
    sample_idx: str,
    question: str,
    contexts: list[str],
    answers: list[str],
    titles: list[str] | None = None,
    useful: list[int] | None = None,
    history: list[tuple[str, str]] | None = None,
    question_type: str = "",
) -> Row | Drop:
    """A row of the schema, or a drop when all its answers are blank.

    Args:
        answers: as the source gives them; blank and repeated ones are left out. Empty: the source says that the
            contexts hold no answer.
        titles: None: no titles.
        useful: None: every context of an answerable question.
    """
    answerable = bool(answers)
    answers = list(dict.fromkeys(text.strip() for text in answers if text.strip())) if answerable else [NO_ANSWER]
    if not answers:
        return Drop(NONE_GIVEN)
    if useful is None:
        useful = list(range(len(contexts))) if answerable else []
    return {
        "sample_idx": sample_idx,
        "dataset": dataset,
        "titles_list": titles if titles is not None else [""] * len(contexts),
        "contexts_list": contexts,
        "useful_contexts": useful,
        "question": question.strip(),
        "history": [{"question": question, "answer": answer} for question, answer in history or []],
        "answer": answers[0],
        "answers": answers,
        "answerable": answerable,
        "question_type": question_type,
    }


def make_text_row(dataset: str, sample_idx: str, title: str, text: str) -> Row:
    """A row of plain text, on which nothing is asked: label-free tasks make their own questions."""
    row = make_row(dataset, sample_idx, "", [text], [], [title])
    return row | {"answer": "", "answers": []}


def validate_row(row: Row) -> Row:
    """Return `row` when it follows the schema.

    Raises:
        RecordError: names the field, the rule and the value.
    """
    if not isinstance(row, dict):
        raise RecordError("row", f"must be an object, got {type(row).__name__}")
    for name in FIELDS:
        if name not in row:
            raise RecordError(name, "is missing")
    if unknown := sorted(set(row) - set(FIELDS)):
        raise RecordError(unknown[0], f"is not a field of the schema, which has {', '.join(FIELDS)}")
    for name in _STRINGS:
        if not isinstance(row[name], str):
            raise RecordError(name, f"must be a string, got {type(row[name]).__name__}")
    for name in _STRING_LISTS:
        if not isinstance(row[name], list) or not all(isinstance(item, str) for item in row[name]):
            raise RecordError(name, f"must be a list of strings, got {str(row[name])[:80]!r}")
    if not isinstance(row["answerable"], bool):
        raise RecordError("answerable", f"must be true or false, got {row['answerable']!r}")
    _validate_contexts(row)
    _validate_answers(row)
    _validate_unicode(row)
    return row


def _validate_contexts(row: Row) -> None:
    contexts, titles, useful = row["contexts_list"], row["titles_list"], row["useful_contexts"]
    if not contexts or not all(text.strip() for text in contexts):
        raise RecordError("contexts_list", "must hold at least one text, and no empty text")
    if len(titles) != len(contexts):
        raise RecordError(
            "titles_list", f"must have one title for each of {len(contexts)} contexts, got {len(titles)}"
        )
    valid = isinstance(useful, list) and all(type(index) is int and 0 <= index < len(contexts) for index in useful)
    if not valid or len(set(useful)) != len(useful):
        raise RecordError("useful_contexts", f"must be distinct indices in [0, {len(contexts) - 1}], got {useful}")
    turns = row["history"]
    if not isinstance(turns, list) or not all(isinstance(t, dict) and set(t) == {"question", "answer"} for t in turns):
        raise RecordError("history", f"must be a list of {{question, answer}}, got {str(turns)[:80]!r}")
    if not all(isinstance(text, str) for turn in turns for text in turn.values()):
        raise RecordError("history", "must hold strings only")


def _validate_answers(row: Row) -> None:
    question, answer, answers = row["question"], row["answer"], row["answers"]
    if question == "":
        # plain text: nothing is asked, tasks make their own questions
        if answer or answers or row["answerable"]:
            raise RecordError("question", "is empty, so `answer` and `answers` must be empty and `answerable` false")
        return
    if not question.strip():
        raise RecordError("question", "must not be blank")
    if not answers or answers[0] != answer or not all(text.strip() for text in answers):
        raise RecordError("answers", f"must start with `answer` ({answer!r}) and hold no empty text, got {answers}")
    if row["answerable"] == (answer == NO_ANSWER):
        raise RecordError("answerable", f"is {row['answerable']}, which contradicts the answer {answer!r}")


def _validate_unicode(row: Row) -> None:
    turns = [text for turn in row["history"] for text in turn.values()]
    texts = {name: [row[name]] for name in _STRINGS} | {name: row[name] for name in _STRING_LISTS} | {"history": turns}
    for name, values in texts.items():
        for value in values:
            # escapes such as \ud800 are valid JSON, but no text
            if half := _HALF_PAIR.search(value):
                raise RecordError(name, f"holds half a surrogate pair at character {half.start()}")
