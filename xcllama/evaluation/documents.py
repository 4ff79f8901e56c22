"""The documents of a task: rows of `dataset_builders` as a data set of lm-eval."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from dataset_builders import FEATURES, SourceError, read_source


def load_documents(
    source: str,
    default_split: str = "test",
    default_path: str | None = None,
    split: str | None = None,
    paths: dict[str, str] | None = None,
    max_documents: int | None = None,
    **lm_eval_metadata: Any,
) -> dict[str, datasets.Dataset]:
    """The questions of a source, as lm-eval's `custom_dataset` wants them: {"test": rows of `FEATURES`}.

    Their order is random and always the same, so that `--limit` takes a sample: files hold the questions of a text in
    a row, and the first twenty of CoQA are one story's.

    Args:
        source: a key of `SOURCES`.
        default_split: "test", "validation", "train" or "all"; a source's test split is never trained on.
        default_path: its files or Hub id; None: the source's own default.
        split: instead of `default_split`, from `--metadata`.
        paths: {source: path} instead of `default_path`, from `--metadata`: official files, a Hub id, or a folder that
            scripts/build_dataset.py made.
        max_documents: read no more than so many, from `--metadata`.
        lm_eval_metadata: what else lm-eval hands over: version, model arguments and the like. Not used.

    Raises:
        ValueError: the data cannot be read; says how to get it.
    """
    path, split = (paths or {}).get(source, default_path), split or default_split
    try:
        rows = [row for row in islice(_rows(source, path, split), max_documents) if row["question"]]
    except (SourceError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the data of {source!r} cannot be read ({reason}). Build it where there is a network with `python "
            f"scripts/build_dataset.py --source {source} --output FOLDER`, then give the folder, or an official file: "
            f'--metadata \'{{"paths": {{"{source}": "FOLDER"}}}}\'.'
        ) from error
    if not rows:
        raise ValueError(f"the {split} split of {source!r} has no questions; give another `split` in --metadata.")
    return {"test": datasets.Dataset.from_list(sorted(rows, key=place), features=FEATURES)}


def place(row: dict[str, Any]) -> bytes:
    """A key that puts rows into an order that is random and always the same."""
    return hashlib.blake2b(f"{row['dataset']} {row['sample_idx']}".encode()).digest()


def _rows(source: str, path: str | None, split: str) -> Iterator[dict[str, Any]]:
    if path is None or not Path(path).is_dir():
        yield from read_source(source, path, split)
        return
    files = sorted(Path(path).rglob("*.parquet" if split == "all" else f"{split}-*.parquet"))
    if not files:
        raise OSError(f"{path} holds no {split}-*.parquet")
    for file in files:
        # the folder may be a build of several sources
        yield from (row for row in read_source("rows", str(file), "all") if row["dataset"] == source)


def yes_or_no(document: dict[str, Any]) -> int:
    """The index of a document's answer among the choices yes and no.

    Raises:
        ValueError: another answer.
    """
    choices = ("yes", "no")
    if document["answer"] not in choices:
        raise ValueError(
            f"document {document['sample_idx']!r} must be answered by yes or no, got {document['answer']!r}."
        )
    return choices.index(document["answer"])
