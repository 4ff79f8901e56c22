"""Questions made from any passage, without labels: they teach to find what is asked for, and to copy it.

Each task takes a passage and a generator and gives (instruction, answer), or None where there is nothing to ask for.
Cloze translation by rules follows the idea of Lewis et al., 2019 (arXiv 1906.04980): a blank becomes a question word.
"""

import random
import re
from collections.abc import Callable

Pair = tuple[str, str]

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(rf"(?:{_MONTHS})(?: \d+)?(?:, \d{{4}})?|1[0-9]\d\d|20[0-2]\d")
_SPAN = re.compile(
    rf"(?:{_MONTHS}) \d+(?:, \d{{4}})?|\b\d[\d,.]*\d\b|\b\d+\b"
    r"|\b[A-Z][\w'-]+(?:\s(?:of\s|the\s|de\s)?[A-Z][\w'-]+)*"
    r"|\b[a-z]{3,} [a-z]{6,}\b|\b[a-z]{6,}\b"
)
_WORDS_OF_KIND = {
    "date": ("when", "what year", "which"),
    "number": ("how many", "how much", "what number"),
    "name": ("who", "what", "which", "where"),
    "other": ("what", "which"),
}


# words that end a phrase, as in RAKE (Rose et al., 2010): function words and the commonest verbs
_BETWEEN = set(
    "a an the this that these those its his her their our my your it he she they we you i him them us who whom "
    "whose which what and or but nor so yet if then than as at by for from in into of off on onto out over to "
    "up with without within about after again against all also although am among any are around be became "
    "because become been before being below between both came can could did do does done down during each "
    "either even ever every few had has have having here how however is just like made make many may might "
    "more most much must near neither no not now often one only other own same shall should since some still "
    "such there therefore though through thus too under until upon very was were when where whether while will "
    "would said says called known used using including several".split()
)


def sentences(passage: str) -> list[str]:
    """The sentences of 6 to 40 words."""
    parts = re.split(r'(?<=[.!?])\s+(?=[A-Z"“(])', passage)
    return [part for part in parts if 6 <= len(part.split()) <= 40]


def cloze(passage: str, generator: random.Random) -> Pair | None:
    """A sentence, or a part of one, with a name, a number or one or two words blanked out."""
    return _blank(_cut(passage, generator), generator)


def phrase_cloze(passage: str, generator: random.Random) -> Pair | None:
    """As `cloze`, with a whole phrase blanked out."""
    return _blank(_cut(passage, generator, phrases), generator)


def question(passage: str, generator: random.Random) -> Pair | None:
    """A question in broken English: a question word, then the words around a span, some of them dropped or moved."""
    return _ask(_cut(passage, generator), generator)


def phrase_question(passage: str, generator: random.Random) -> Pair | None:
    """As `question`, for a whole phrase."""
    return _ask(_cut(passage, generator, phrases), generator)


def _blank(cut: tuple[str, str, str] | None, generator: random.Random) -> Pair | None:
    if cut is None:
        return None
    left, answer, right = cut
    if generator.random() < 0.4:
        left = " ".join(left.split(" ")[-generator.randint(4, 12) :])
        right = " ".join(right.split(" ")[: generator.randint(3, 12)])
    return f"Fill in the blank: {(left + '____' + right).strip()}", answer


def _ask(cut: tuple[str, str, str] | None, generator: random.Random) -> Pair | None:
    if cut is None:
        return None
    left, answer, right = cut[0].strip(), cut[1], cut[2].strip().rstrip(".!?")
    if generator.random() < 0.6:
        left = re.split(r"[,;:] ", left)[-1]
    if generator.random() < 0.6:
        right = re.split(r"[,;:] ", right)[0]
    left, word = _question_word(left, answer, generator)
    parts = [right, left] if left and right and generator.random() < 0.5 else [left, right]
    words = " ".join(parts).split()
    if len(words) < 3:
        return None
    words = [item for item in words if generator.random() > 0.1]
    if generator.random() < 0.3:
        moved = [(index + generator.uniform(0, 3), item) for index, item in enumerate(words)]
        words = [item for _, item in sorted(moved)]
    text = " ".join([word, *words]).strip(" ,;:") + "?"
    return (text[0].upper() + text[1:] if generator.random() < 0.7 else text), answer


def completion(passage: str, generator: random.Random) -> Pair | None:
    """The first words of a sentence; the answer is how it goes on, 16 words at most."""
    found = sentences(passage)
    if not found:
        return None
    words = generator.choice(found).split()
    start = generator.randint(3, max(3, len(words) * 2 // 3))
    return f"Complete the sentence: {' '.join(words[:start])}", " ".join(words[start : start + 16])


def infilling(passage: str, generator: random.Random) -> Pair | None:
    """Two sentences of the passage; the answer is the sentence between them."""
    found = sentences(passage)
    if len(found) < 3:
        return None
    index = generator.randrange(1, len(found) - 1)
    before, after = found[index - 1].split()[-12:], found[index + 1].split()[:12]
    return f"What stands between? {' '.join(before)} ____ {' '.join(after)}", found[index]


def repetition(passage: str, generator: random.Random) -> Pair | None:
    """The whole passage, or its first 96 words."""
    words = passage.split()
    return ("Repeat the text.", " ".join(words[:96])) if words else None


LABEL_FREE: dict[str, Callable[[str, random.Random], Pair | None]] = {
    "question": question,
    "cloze": cloze,
    "phrase_question": phrase_question,
    "phrase_cloze": phrase_cloze,
    "completion": completion,
    "infilling": infilling,
    "repetition": repetition,
}


def spans(sentence: str) -> list[tuple[int, int]]:
    """Names, dates, numbers, and one or two long words."""
    return [match.span() for match in _SPAN.finditer(sentence)]


def phrases(sentence: str) -> list[tuple[int, int]]:
    """Runs of one to six words between function words and punctuation; two runs around "of" make one."""
    found: list[tuple[int, int]] = []
    for run in re.finditer(r"[^\s,;:()\[\]\"“”.!?]+(?:[.,]\d+)*(?: [^\s,;:()\[\]\"“”.!?]+(?:[.,]\d+)*)*", sentence):
        start = end = None
        for word in re.finditer(r"\S+", run.group()):
            if word.group().lower() not in _BETWEEN:
                start = word.start() if start is None else start
                end = word.end()
                continue
            goes_on = word.group() == "of" and start is not None
            if not goes_on and start is not None:
                found.append((run.start() + start, run.start() + end))
                start = None
        if start is not None:
            found.append((run.start() + start, run.start() + end))
    return [(start, end) for start, end in found if end - start > 2 and len(sentence[start:end].split()) <= 6]


def _cut(
    passage: str, generator: random.Random, find: Callable[[str], list[tuple[int, int]]] = spans
) -> tuple[str, str, str] | None:
    """A sentence as what precedes a span, the span, and what follows it; names and numbers are preferred."""
    found = sentences(passage)
    if not found:
        return None
    sentence = generator.choice(found)
    places = [place for place in find(sentence) if place[0] > 0]
    if not places:
        return None
    named = [(start, end) for start, end in places if not sentence[start].islower()]
    start, end = generator.choice(named if named and generator.random() < (0.75 if find is spans else 0.5) else places)
    return sentence[:start], sentence[start:end], sentence[end:]


def _question_word(left: str, answer: str, generator: random.Random) -> tuple[str, str]:
    """The words before the blank, and a question word that fits the answer."""
    if _DATE.fullmatch(answer):
        if left.lower().endswith((" in", " on", " by", " since", " at")):
            return left.rsplit(" ", 1)[0], "when"
        kind = "date"
    elif any(letter.isdigit() for letter in answer):
        kind = "number"
    else:
        kind = "other" if answer[0].islower() else "name"
    if kind == "name" and left.lower().endswith((" in", " at", " near", " from")):
        return left, generator.choice(("where", "which place", "what"))
    return left, generator.choice(_WORDS_OF_KIND[kind])
