"""Texts as passages: where they are cut, which of them fit a question, and which sentence an answer stands in."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

# tokens of a passage: at least, and at most without and with the words that it repeats where a sentence was cut
PASSAGE_TOKENS = (100, 220, 250)
# where a text may be cut, and how well: before a heading, between paragraphs, lines, sentences
BREAK = re.compile(
    r"(?P<heading>\s*\n(?=#{1,6} ))|(?P<paragraph>\s*\n\s*\n\s*)|(?P<line>[^\S\n]*\n[^\S\n]*)"
    r"|(?P<sentence>(?<![\s.][A-Z])(?<!\b(?:Dr|Mr|Ms|St|No|vs))(?<!\b(?:Mrs|e\.g|i\.e))[.!?…।؟]+[\"'”’»)\]]*[^\S\n]+|[。！？]+)"
)
LEVELS = {"heading": 4, "paragraph": 3, "line": 2, "sentence": 1}
# scripts without spaces between words: their pairs of letters stand for words
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
ENDING = re.compile(r"(?<=\w{3})(?:ing|ed|es|er|s|e)$")
STOP_WORDS = frozenset(
    "a an and are as at be by did do does for from had has have he how in is it its of on or she that the their they "
    "this to was were what when where which who whom whose why will with".split()
)
# saturation and length of BM25
K1, B = 1.2, 0.75


def split_passages(
    text: str, count_tokens: Callable[[str], int], sizes: tuple[int, int, int] = PASSAGE_TOKENS
) -> list[tuple[int, int]]:
    """(start, stop) of the passages of a text in its characters: headings and paragraphs first, then sentences.

    A sentence that is longer than a passage is cut between words, and what follows repeats the last words before
    the cut. What lies between passages is white space.

    Args:
        count_tokens: how many tokens a text has.
        sizes: tokens of a passage: at least (where the text allows it), at most, at most with repeated words.
    """
    least, most, whole = sizes
    if count_tokens(text) <= whole:
        return [(0, len(text))]
    pieces = [(start, stop, level, count_tokens(text[start:stop])) for start, stop, level in _pieces(text)]
    pieces = [small for piece in pieces for small in _small(text, piece, count_tokens, most)]
    spans: list[tuple[int, int]] = []
    first, repeated = 0, 0
    while first < len(pieces):
        last, total, ends = first, repeated, []
        while last < len(pieces) and (last == first or total + pieces[last][3] <= most):
            total += pieces[last][3]
            last += 1
            ends.append((last, total))
        if last < len(pieces):
            # the best place to cut, of equal ones the last
            fitting = [end for end, tokens in ends if tokens >= least] or [last]
            last = max(fitting, key=lambda end: (pieces[end - 1][2], end))
        start, stop = pieces[first][0], pieces[last - 1][1]
        if spans and not pieces[first - 1][2]:
            start = _earlier(text, spans[-1][0], start, whole - most)
        spans.append((start, stop))
        first = last
    stripped = [
        (start + len(own) - len(own.lstrip()), start + len(own.rstrip()))
        for start, own in ((start, text[start:stop]) for start, stop in spans)
    ]
    return [span for span in stripped if span[0] < span[1]]


def _pieces(text: str) -> Iterator[tuple[int, int, int]]:
    """(start, stop, how good a cut behind it is) of sentences and lines; together they are the text."""
    start = 0
    for match in BREAK.finditer(text):
        if match.end() > start:
            yield start, match.end(), LEVELS[match.lastgroup]
            start = match.end()
    if start < len(text):
        yield start, len(text), LEVELS["paragraph"]


def _small(text: str, piece: tuple, count_tokens: Callable[[str], int], most: int) -> Iterator[tuple]:
    """A piece, cut between words (or anywhere, where there are none) until each part has at most `most` tokens."""
    start, stop, level, tokens = piece
    if tokens <= most or stop - start < 2:
        yield piece
        return
    middle = (start + stop) // 2
    blank = text.rfind(" ", start + 1, middle)
    cut = blank + 1 if blank > start else middle
    for first, last, cut_level in ((start, cut, 0), (cut, stop, level)):
        yield from _small(text, (first, last, cut_level, count_tokens(text[first:last])), count_tokens, most)


def _earlier(text: str, low: int, start: int, tokens: int) -> int:
    """A place between words before `start`, by at most so many tokens: one has a letter at least."""
    window = text[max(low, start - tokens) : start]
    blank = re.search(r"\s+\S", window)
    return start - len(window) + blank.end() - 1 if blank else start


def words_of(text: str) -> list[str]:
    """The words of a text by which it is found: without endings, and of scripts without spaces pairs of letters."""
    words = []
    for word in re.findall(r"\w+", UNSPACED.sub(r" \g<0> ", text.lower())):
        if UNSPACED.match(word) and len(word) > 1:
            words += [word[place : place + 2] for place in range(len(word) - 1)]
        else:
            words.append(ENDING.sub("", word))
    return words


def rank_passages(question: str, passages: Sequence[str], most: int) -> list[int]:
    """The `most` passages that fit a question best, best first (BM25); those without its words come last, in order."""
    counts = [Counter(words_of(passage)) for passage in passages]
    asked = {ENDING.sub("", word) for word in STOP_WORDS}
    terms = set(words_of(question)) - asked or set(words_of(question))
    lengths = [sum(count.values()) for count in counts]
    mean = sum(lengths) / max(len(lengths), 1) or 1.0
    scores = [0.0] * len(passages)
    for term in terms:
        having = sum(term in count for count in counts)
        weight = math.log(1 + (len(passages) - having + 0.5) / (having + 0.5))
        for place, count in enumerate(counts):
            often = count[term]
            scores[place] += weight * often * (K1 + 1) / (often + K1 * (1 - B + B * lengths[place] / mean))
    return sorted(range(len(passages)), key=lambda place: (-scores[place], place))[:most]


def find_sentence(passages: Sequence[str], question: str, answer: str) -> tuple[int, int, int]:
    """(passage, start, stop) of the sentence that an answer stands in; where it stands in none, of the most like it.

    Among several sentences with the answer the one that has most words of the question.
    """
    wanted, asked = words_of(answer), set(words_of(question))
    pattern = r"\W+".join(map(re.escape, answer.lower().split()))
    best, place = (False, -1, -1), (0, 0, 0)
    for number, passage in enumerate(passages):
        for start, stop, _ in _pieces(passage):
            own = passage[start:stop].rstrip()
            words = set(words_of(own))
            stands = bool(pattern) and re.search(rf"(?<!\w){pattern}(?!\w)", own.lower()) is not None
            fit = stands, len(words.intersection(wanted)), len(words & asked)
            if fit > best:
                best, place = fit, (number, start, start + len(own))
    return place
