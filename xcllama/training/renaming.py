"""Copies of passages with invented names and numbers: what they answer cannot be known, only read and copied."""

import random
import re

from xcllama.training.passages import Passage, Question

_NAME = re.compile(r"\b[A-Z][a-z]{2,}\b")
_INSIDE = re.compile(r"(?<=[\w,;:] )([A-Z][a-z]{2,})\b")
_NUMBER = re.compile(r"\d{2,}")
# capitalized words that are no names, and those whose meaning the rest of a sentence relies on
_KEPT = set(
    "The This That These Those There Then They Their When Where While What Which Who Whose Why How His Her Its "
    "Our She You Your And But For From With Without Into After Before During Between Because Although However "
    "Also Some Many Most Such Each Every Both One Two Three Four Five Six Seven Eight Nine Ten First Second Third "
    "Not Yes Did Does Was Were Are Has Have Had Can Could May Might Will Would Should Must January February March "
    "April June July August September October November December Monday Tuesday Wednesday Thursday Friday Saturday "
    "Sunday Fill Complete".split()
)
_ONSETS = "b br c ch d dr f fl g gr h j k kr l m n p pr r s sh st t th tr v w z".split() + [""]
_VOWELS = "a e i o u a e i o ai ea ee ie oa ou".split()
_ENDS = "n r l s t d m x ck nd rk ll ss".split() + ["", "", ""]


def with_renamed(passages: list[Passage], count: int, seed: int) -> list[Passage]:
    """The passages, and behind them `count` of them once more with invented names.

    Raises:
        ValueError: there are fewer passages.
    """
    if count > len(passages):
        raise ValueError(f"`data.renamed` is {count}, and there are {len(passages)} passages; lower it.")
    copies = [rename(passage, random.Random(f"{seed}:renamed:{i}")) for i, passage in enumerate(passages[:count])]
    return passages + copies


def rename(passage: Passage, generator: random.Random) -> Passage:
    """The passage with every name and every number of two digits or more replaced, the same way in its questions.

    Questions whose answer no longer stands in the text, as sums and counts, are left out.
    """
    # the first word of a sentence is a name when it is capitalized elsewhere too
    found = [match.group(1) for match in _INSIDE.finditer(passage.text)]
    names = {word: invent_name(generator) for word in dict.fromkeys(found) if word not in _KEPT}
    numbers: dict[str, str] = {}
    for match in _NUMBER.finditer(passage.text):
        numbers.setdefault(match.group(), _digits(match.group(), generator))

    def replaced(text: str) -> str:
        text = _NAME.sub(lambda match: names.get(match.group(), match.group()), text)
        return _NUMBER.sub(lambda match: numbers.get(match.group(), match.group()), text)

    text = replaced(passage.text)
    questions = []
    for item in passage.questions:
        answer = replaced(item.answer)
        if answer.lower() in text.lower():
            history = tuple((replaced(asked), replaced(said)) for asked, said in item.history)
            questions.append(Question(replaced(item.text), answer, item.source, history))
    return Passage(text, passage.source, questions)


def invent_name(generator: random.Random) -> str:
    """A capitalized word of one to three syllables."""
    syllables = generator.choices((1, 2, 3), weights=(2, 5, 2))[0]
    parts = [generator.choice(_ONSETS) + generator.choice(_VOWELS) for _ in range(syllables)]
    return ("".join(parts) + generator.choice(_ENDS)).capitalize()


def _digits(number: str, generator: random.Random) -> str:
    if re.fullmatch(r"1[0-9]\d\d|20[0-2]\d", number):
        return str(generator.randint(1100, 2029))
    return str(generator.randint(1, 9)) + "".join(str(generator.randint(0, 9)) for _ in number[1:])
