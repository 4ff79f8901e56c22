"""BM25 over the passages of a catalogue (SQLite FTS5), in scripts with and without spaces."""

import json
import time
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass

import regex

from .catalogue import Catalogue

# runs of letters of scripts that put no spaces between words (Hangul: none before particles)
UNSPACED = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Hangul}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Javanese}\p{Balinese}]+"
)
# left out of queries that have rarer words: their postings make up most of a search's time
STOP_WORDS = frozenset(
    "a about an and are as at be been but by can could did do does for from had has have he her his how i if in into "
    "is it its me my no not of on or our she should so some than that the their them then there these they this to "
    "was we were what when where which who whom whose why will with would you your".split()
)
# passages that are ranked in one search, about: BM25 takes a microsecond for each
POSTINGS = 4_000
SNIPPET_CHARACTERS = 200
QUERY = (
    "SELECT id, position, -words.rank, passages.start, stop, passages.text, metadata, tokens FROM words "
    "JOIN passages ON passage = words.rowid JOIN documents USING (document) JOIN states USING (state) "
    "WHERE words MATCH ? AND words.rowid >= ? AND expires > ?{filters} ORDER BY words.rank LIMIT ?"
)


@dataclass(frozen=True)
class Hit:
    """A passage that was found; `ContextStore.get` takes it.

    Args:
        id: of the document.
        position: of the passage in it, from 0.
        score: larger is better (the negated BM25 of FTS5).
        start, stop: characters of the document's text.
        text: the passage.
        snippet: the part of it around the first word that was found.
        metadata: of the document.
        tokens: whose states are stored.
    """

    id: str
    position: int
    score: float
    start: int
    stop: int
    text: str
    snippet: str
    metadata: dict
    tokens: int

    @property
    def page(self) -> int | None:
        """The page of a paged document on which the passage starts, from 1."""
        starts = self.metadata.get("pages")
        return bisect_right(starts, self.start) if starts else None


def index_text(text: str) -> str:
    """What the words index holds of a text: words as they are, unspaced scripts as pairs of letters.

    A run of such letters becomes its overlapping pairs and its last letter, so that any part of it is found as a
    phrase of pairs, and a single letter as the start of a word.
    """
    text = unicodedata.normalize("NFKC", text)
    return UNSPACED.sub(lambda run: f" {' '.join(letter_pairs(run[0]))} {run[0][-1]} ", text)


def letter_pairs(run: str) -> list[str]:
    """The overlapping pairs of letters of a run of at least two; none of a single letter."""
    return [run[place : place + 2] for place in range(len(run) - 1)]


def terms_of(query: str) -> dict[str, str]:
    """The distinct words of a query with their FTS5 expressions; stop words only where there are no others."""
    terms: dict[str, str] = {}
    text = unicodedata.normalize("NFKC", query).lower()
    for run in regex.findall(r"[\p{L}\p{N}\p{M}]+", UNSPACED.sub(r" \g<0> ", text)):
        if not UNSPACED.match(run):
            terms[run] = f'"{run}"'
        elif len(run) == 1:
            terms[run] = f'"{run}"*'
        else:
            # a question may be one run: its pairs find what has some of them, the phrase ranks what has all
            pairs = letter_pairs(run)
            terms |= {run: f'"{" ".join(pairs)}"'} | {pair: f'"{pair}"' for pair in pairs}
    return {word: term for word, term in terms.items() if word not in STOP_WORDS} or terms


def _count(catalogue: Catalogue, term: str) -> int:
    """Passages that match, counted up to one above `POSTINGS`."""
    query = "SELECT COUNT(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT ?)"
    return catalogue.rows(query, (term, POSTINGS + 1))[0][0]


def match_expression(catalogue: Catalogue, terms: list[str]) -> str | None:
    """An FTS5 expression that few passages match, if the terms allow one; None: nothing matches.

    Any of the terms, the rarest first, as long as they have at most `POSTINGS` passages together; where each has more,
    all of them in one passage, or the first.
    """
    counts = {term: count for term in terms if (count := _count(catalogue, term))}
    chosen, total = [], 0
    for term in sorted(counts, key=counts.__getitem__):
        total += counts[term]
        if total > POSTINGS:
            break
        chosen.append(term)
    if chosen or not counts:
        return " OR ".join(chosen) or None
    together = " AND ".join(counts)
    return together if _count(catalogue, together) else next(iter(counts))


def search(catalogue: Catalogue, query: str, k: int, where: dict | None) -> list[Hit]:
    """The `k` passages that match `query` best and have the metadata `where`.

    What more than `POSTINGS` passages match is ranked among the newest of them, unless `where` or `k` asks for more.
    """
    terms = terms_of(query)
    expression = match_expression(catalogue, list(terms.values()))
    if expression is None:
        return []
    first = 0
    if not where and k <= POSTINGS:
        newest = "SELECT rowid FROM words WHERE words MATCH ? ORDER BY rowid DESC LIMIT 1 OFFSET ?"
        found = catalogue.rows(newest, (expression, POSTINGS - 1))
        first = found[0][0] if found else 0
    filters, values = "", []
    for field, value in (where or {}).items():
        allowed = list(value) if isinstance(value, list | tuple | set) else [value]
        filters += f" AND json_extract(metadata, ?) IN ({','.join('?' * len(allowed))})"
        values += ["$." + json.dumps(field, ensure_ascii=False), *allowed]
    rows = catalogue.rows(QUERY.format(filters=filters), (expression, first, time.time(), *values, k))
    return [
        Hit(id_, position, score, start, stop, text, snippet(text, terms), json.loads(metadata), tokens)
        for id_, position, score, start, stop, text, metadata, tokens in rows
    ]


def snippet(text: str, words: dict[str, str] | list[str]) -> str:
    """The part of a text around the first of `words` (or what begins like it), whole words only."""
    if len(text) <= SNIPPET_CHARACTERS:
        return text
    lower = text.lower()
    places = [place for word in words if (place := lower.find(word[: max(4, len(word) - 3)])) >= 0]
    start = max(0, min(places, default=0) - SNIPPET_CHARACTERS // 4)
    if start:
        start = text.find(" ", start, start + 40) + 1 or start
    stop = min(len(text), start + SNIPPET_CHARACTERS)
    if stop < len(text):
        stop = max(text.rfind(" ", stop - 40, stop), 0) or stop
    return ("… " if start else "") + text[start:stop] + (" …" if stop < len(text) else "")
