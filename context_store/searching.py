"""BM25 over the texts of a catalogue (SQLite FTS5)."""

import json
import re
import time
from dataclasses import dataclass
from typing import NamedTuple

from .catalogue import Catalogue, marks

# left out of queries that have rarer words: their postings make up most of a search's time
STOP_WORDS = frozenset(
    "a about an and are as at be been but by can could did do does for from had has have he her his how i if in into "
    "is it its me my no not of on or our she should so some than that the their them then there these they this to "
    "was we were what when where which who whom whose why will with would you your".split()
)
# documents that are ranked in one search, about: BM25 takes a microsecond for each
POSTINGS = 4_000
MATCHES_KEPT = 5_000
# of all documents: commoner words never narrow a search
STOP_PART = 0.25


class Matches(NamedTuple):
    """Documents that match an expression, estimated above `POSTINGS`, and the first of the newest `POSTINGS` rows."""

    count: int
    first: int


@dataclass(frozen=True)
class Hit:
    """A search result: larger `score`, better match (the negated BM25 of FTS5)."""

    id: str
    score: float
    snippet: str
    metadata: dict
    tokens: int


def match_expression(catalogue: Catalogue, query: str) -> str | None:
    """An FTS5 expression that few documents match, if the words of `query` allow one.

    Any of the words, the rarest first, as long as they have at most `POSTINGS` documents together; where the rarest
    has more by itself, it and the next one in one document.
    """
    words = list(dict.fromkeys(re.findall(r"\w+", query.lower())))
    words = [word for word in words if word not in STOP_WORDS] or words
    counts = {f'"{word}"': matches(catalogue, f'"{word}"').count for word in words}
    rarest, *others = sorted((word for word in counts if counts[word]), key=counts.__getitem__) or [None]
    if rarest is None:
        return None
    chosen, total = [rarest], counts[rarest]
    if total > POSTINGS:
        # BM25 reads all postings of a word: those of the commonest take longest and say least
        both = [f"{rarest} AND {word}" for word in others[:1] if counts[word] < STOP_PART * len(catalogue.locations)]
        return next((expression for expression in both if matches(catalogue, expression).count), rarest)
    for word in others:
        total += counts[word]
        if total > POSTINGS:
            break
        chosen.append(word)
    return " OR ".join(chosen)


def matches(catalogue: Catalogue, expression: str) -> Matches:
    """What matches an expression, remembered while the corpus keeps its size."""
    known, size = catalogue.matches, len(catalogue.locations)
    if abs(size - catalogue.matched_size) * 50 > size or len(known) > MATCHES_KEPT:
        known.clear()
        catalogue.matched_size = size
    if expression in known:
        return known[expression]
    found, first, last = catalogue.rows(
        "SELECT COUNT(*), MIN(rowid), (SELECT MAX(document) FROM texts) FROM "
        "(SELECT rowid FROM words WHERE words MATCH ? ORDER BY rowid DESC LIMIT ?)",
        (expression, POSTINGS + 1),
    )[0]
    result = Matches(found, 0)
    if found > POSTINGS:
        # as many again for every so many rows
        result = Matches(max(found, found * size // (last - first + 1)), first)
    # a word that nothing has may stand in the next document
    if found:
        known[expression] = result
    return result


def search(catalogue: Catalogue, query: str, k: int, where: dict | None) -> list[Hit]:
    """The `k` documents that match `query` best and have the metadata `where`.

    What more than `POSTINGS` documents match is ranked among the newest of them, unless `where` or `k` asks for more.
    """
    catalogue.refresh()
    expression = match_expression(catalogue, query)
    if expression is None:
        return []
    filters, values = "", []
    for field, value in (where or {}).items():
        allowed = list(value) if isinstance(value, list | tuple | set) else [value]
        filters += f" AND json_extract(documents.metadata, ?) IN ({marks(allowed)})"
        values += ["$." + json.dumps(field, ensure_ascii=False), *allowed]
    first = 0 if where or k > POSTINGS else matches(catalogue, expression).first
    rows = catalogue.rows(
        "SELECT documents.id, -words.rank, snippet(words, 0, '', '', ' ... ', 32), documents.metadata, "
        "documents.tokens FROM words JOIN documents ON documents.document = words.rowid "
        f"WHERE words MATCH ? AND words.rowid >= ? AND documents.expires > ?{filters} ORDER BY words.rank LIMIT ?",
        (expression, first, time.time(), *values, k),
    )
    return [Hit(row[0], row[1], row[2], json.loads(row[3]), row[4]) for row in rows]
