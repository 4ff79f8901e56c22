"""Tasks that need no labels, on any text: repetition, fill-in-the-middle, cloze and sentence completion.

Each takes a text and a seeded generator and returns (question, answer) pairs whose answer stands in the text.
"""

import random
import re

BLANK = "____"
MIN_SENTENCE_WORDS, MAX_SENTENCE_WORDS = 6, 35
# how often a name or a number is masked, where the sentence has one, rather than any content word
NAME_SHARE = 0.7

_NAME_OR_NUMBER = re.compile(r"\b(?:[A-Z][a-z]+(?:\s[A-Z][a-z]+)*|\d[\d,.]*\d|\d)\b")
_CONTENT_WORD = re.compile(r"\b[a-z]{6,}\b")


def sentences(text: str) -> list[str]:
    """The sentences of `text`, cut after . ! ? and at line ends; joining them loses only white space."""
    return [part for part in re.split(r"(?<=[.!?])\s+|\s*\n\s*", text.strip()) if part]


def usable_sentences(text: str) -> list[str]:
    """The sentences long enough to ask about and short enough to read."""
    return [s for s in sentences(text) if MIN_SENTENCE_WORDS <= len(s.split()) <= MAX_SENTENCE_WORDS]


def window(text: str, generator: random.Random, max_words: int | None) -> str:
    """`text`, or `max_words` consecutive words of it at a random place, with the white space between them."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    if max_words is None or len(spans) <= max_words:
        return text.strip()
    first = generator.randrange(len(spans) - max_words + 1)
    return text[spans[first][0] : spans[first + max_words - 1][1]]


def repeat(text: str, generator: random.Random, max_words: int | None = None) -> list[tuple[str, str]]:
    """Reproduce the text, or `max_words` words of it after the ones quoted."""
    if max_words is None or len(text.split()) <= max_words:
        return [("Repeat the text.", text.strip())]
    part = window(text, generator, max_words)
    words = part.split()
    start = " ".join(words[: min(8, len(words) // 2)])
    return [(f"Repeat the {len(words)} words of the text that start with: {start}", part)]


def fill_in_the_middle(text: str, generator: random.Random, max_words: int | None = None) -> list[tuple[str, str]]:
    """Give back the middle of the text from what stands before and after it; either may be quoted first.

    Text before, answer and text after, put together, are the text (or a window of `max_words` words) but for spaces.
    """
    part = window(text, generator, max_words)
    starts = [match.start() for match in re.finditer(r"\S+", part)]
    if len(starts) < 3:
        return []
    first, second = sorted(generator.sample(range(1, len(starts)), 2))
    prefix, middle, suffix = part[: starts[first]], part[starts[first] : starts[second]], part[starts[second] :]
    before, after = f"Before: {prefix.strip()}", f"After: {suffix.strip()}"
    quoted = [before, after] if generator.random() < 0.5 else [after, before]
    return [("\n".join(["Fill in the missing middle of the text.", *quoted]), middle.strip())]


def cloze(text: str, generator: random.Random, count: int = 1) -> list[tuple[str, str]]:
    """At most `count` sentences with a name, a number or a content word masked, one each."""
    candidates = usable_sentences(text)
    pairs = []
    for sentence in generator.sample(candidates, len(candidates)):
        if len(pairs) == count:
            break
        # the first word's capital says nothing
        names = [match for match in _NAME_OR_NUMBER.finditer(sentence) if match.start() > 0]
        words = [match for match in _CONTENT_WORD.finditer(sentence) if match.start() > 0]
        preferred = names if generator.random() < NAME_SHARE else words
        if not (choices := preferred or names or words):
            continue
        chosen = generator.choice(choices)
        masked = sentence[: chosen.start()] + BLANK + sentence[chosen.end() :]
        pairs.append((f"Fill in the blank: {masked}", chosen.group()))
    return pairs


def complete_sentence(text: str, generator: random.Random, max_words: int = 8) -> list[tuple[str, str]]:
    """The next words (at most `max_words`) of a sentence whose first half is given."""
    if not (candidates := usable_sentences(text)):
        return []
    words = generator.choice(candidates).split()
    half = len(words) // 2
    return [(f"Complete the sentence: {' '.join(words[:half])}", " ".join(words[half : half + max_words]))]
