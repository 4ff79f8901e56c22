"""Texts of other documents: distractors beside the useful context, or in its place."""

import random

from dataset_builders.schema import Row
from dataset_builders.splits import document_key, holds, normalize
from dataset_builders.text_tasks import sentences


class DistractorPool:
    """The most recent contexts of a stream of rows, one a document, for other rows to draw from.

    Args:
        size: number of documents remembered.
    """

    def __init__(self, size: int = 256):
        if size < 2:
            raise ValueError(f"`size` must be at least 2 documents, got {size}.")
        self.size = size
        self._texts: dict[str, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, row: Row) -> None:
        """Remember the first useful context of `row` (its first one where none is useful)."""
        index = min(row["useful_contexts"], default=0)
        self._texts.setdefault(document_key(row), (row["titles_list"][index], row["contexts_list"][index]))
        if len(self._texts) > self.size:
            del self._texts[next(iter(self._texts))]

    def draw(self, row: Row, count: int, generator: random.Random) -> list[tuple[str, str]]:
        """`count` (title, text) of other documents without an accepted answer of `row`, or as many as there are."""
        own_titles = {normalize(title) for title in row["titles_list"] if title}
        own_texts = set(row["contexts_list"])
        answers = [normalize(answer) for answer in row["answers"] if row["answerable"]]
        others = []
        for key in generator.sample(sorted(self._texts), len(self._texts)):
            if len(others) == count:
                break
            title, text = self._texts[key]
            if key == document_key(row) or normalize(title) in own_titles or text in own_texts:
                continue
            if not any(holds(text, answer) for answer in answers):
                others.append((title, text))
        return others


def chunks(text: str, max_words: int) -> list[str]:
    """`text` cut into pieces of at most `max_words` words, between sentences where it can be; no word is lost."""
    if max_words < 1:
        raise ValueError(f"`max_words` must be at least 1, got {max_words}.")
    pieces, current = [], []
    for sentence in sentences(text):
        words = sentence.split()
        if current and len(current) + len(words) > max_words:
            pieces.append(current)
            current = []
        current = current + words
        while len(current) > max_words:
            pieces.append(current[:max_words])
            current = current[max_words:]
    return [" ".join(piece) for piece in [*pieces, current] if piece]
