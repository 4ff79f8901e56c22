"""BM25 over the texts of a catalogue (SQLite FTS5)."""

import json
import re
import time
from dataclasses import dataclass

from .catalogue import Catalogue, marks

# left out of queries that have rarer words: their postings make up most of a search's time
STOP_WORDS = frozenset(
    "a about an and are as at be been but by can could did do does for from had has have he her his how i if in into "
    "is it its me my no not of on or our she should so some than that the their them then there these they this to "
    "was we were what when where which who whom whose why will with would you your".split()
)
# documents that the words of one query may have, together, before common ones are left out
POSTINGS = 10_000


@dataclass(frozen=True)
class Hit:
    """A search result: larger `score`, better match (the negated BM25 of FTS5)."""

    id: str
    score: float
    snippet: str
    metadata: dict
    tokens: int


def match_expression(catalogue: Catalogue, query: str) -> str | None:
    """An FTS5 expression: any of the words of `query`, the rarest first, while few enough documents have them."""
    words = list(dict.fromkeys(re.findall(r"\w+", query.lower())))
    words = [word for word in words if word not in STOP_WORDS] or words
    counts = {word: count_documents(catalogue, word) for word in words}
    chosen, total = [], 0
    for word in sorted(words, key=counts.__getitem__):
        total += counts[word]
        # words that nearly all documents have cost most and say least
        if total > POSTINGS and chosen and counts[chosen[-1]]:
            break
        chosen.append(word)
    return " OR ".join(f'"{word}"' for word in chosen) or None


def count_documents(catalogue: Catalogue, word: str) -> int:
    """Documents that have `word`, counted up to `POSTINGS` + 1 and remembered while the corpus keeps its size."""
    counts = catalogue.word_counts
    size = len(catalogue.locations)
    if abs(size - counts.get("", 0)) * 10 > size or len(counts) > 20_000:
        counts.clear()
        counts[""] = size
    if word not in counts:
        query = "SELECT COUNT(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT ?)"
        counts[word] = catalogue.rows(query, (f'"{word}"', POSTINGS + 1))[0][0]
    return counts[word]


def search(catalogue: Catalogue, query: str, k: int, where: dict | None) -> list[Hit]:
    """The `k` documents that match `query` best and have the metadata `where`."""
    catalogue.refresh()
    expression = match_expression(catalogue, query)
    if expression is None:
        return []
    filters, values = "", []
    for field, value in (where or {}).items():
        allowed = list(value) if isinstance(value, list | tuple | set) else [value]
        filters += f" AND json_extract(documents.metadata, ?) IN ({marks(allowed)})"
        values += ["$." + json.dumps(field, ensure_ascii=False), *allowed]
    rows = catalogue.rows(
        "SELECT documents.id, -words.rank, snippet(words, 0, '', '', ' ... ', 32), documents.metadata, "
        "documents.tokens FROM words JOIN documents ON documents.document = words.rowid "
        f"WHERE words MATCH ? AND documents.expires > ?{filters} ORDER BY words.rank LIMIT ?",
        (expression, time.time(), *values, k),
    )
    return [Hit(row[0], row[1], row[2], json.loads(row[3]), row[4]) for row in rows]
