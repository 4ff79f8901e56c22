"""Splits by document: all questions on one document fall on one side, whatever the source.

Train, validation and test are shares of the sources that may be trained on. Benchmarks are test, but for the documents
that a source sets aside as dev: choices may be made on their questions, and what is reported is measured on the rest.
"""

import hashlib
import re

from dataset_builders.schema import Row

SPLITS = ("train", "validation", "dev", "test")
TRAIN_SHARE, VALIDATION_SHARE = 0.90, 0.05


def normalize(text: str) -> str:
    """Lower-case words and numbers joined by single spaces: what "the same text" means throughout."""
    return " ".join(re.findall(r"\w+", text.lower()))


def holds(text: str, normalized_answer: str) -> bool:
    """Whether the words of an answer stand in `text`, in order; yes and no stand nowhere."""
    if normalized_answer in ("yes", "no", ""):
        return False
    return f" {normalized_answer} " in f" {normalize(text)} "


def digest(text: str) -> str:
    """128-bit hexadecimal digest of the normalized text."""
    return hashlib.blake2b(normalize(text).encode(), digest_size=16).hexdigest()


def document_key(row: Row) -> str:
    """What names the document that a row asks about: a title, or the digest of an untitled context.

    Several useful contexts (multi-hop): the smallest key, which does not depend on their order. The mix removes what
    is still shared between splits.
    """
    indices = row["useful_contexts"] or range(len(row["contexts_list"]))
    titles, contexts = row["titles_list"], row["contexts_list"]
    return min(normalize(titles[index]) or "digest:" + digest(contexts[index]) for index in indices)


def split_of(key: str) -> str:
    """The split of a document, from a digest of its key, never of a seed: no two builds disagree on what is test."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
    if number < TRAIN_SHARE:
        return "train"
    return "validation" if number < TRAIN_SHARE + VALIDATION_SHARE else "test"


def check_split(split: str) -> str:
    """Return `split` when it is one of `SPLITS` or "all"."""
    if split not in (*SPLITS, "all"):
        raise ValueError(f'`split` must be one of {", ".join(SPLITS)} or "all", got {split!r}.')
    return split
