"""The documents of a task: rows of `dataset_builders` as a data set of lm-eval."""

from itertools import islice
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

    Args:
        source: a key of `SOURCES`.
        default_split: "test", "validation", "train" or "all"; a source's test split is never trained on.
        default_path: its files or Hub id; None: the source's own default.
        split: instead of `default_split`, from `--metadata`.
        paths: {source: path} instead of `default_path`, from `--metadata`.
        max_documents: read no more than so many, from `--metadata`.
        lm_eval_metadata: what else lm-eval hands over: version, model arguments and the like. Not used.

    Raises:
        ValueError: the data cannot be read; says how to get it.
    """
    path, split = (paths or {}).get(source, default_path), split or default_split
    try:
        rows = [row for row in islice(read_source(source, path, split), max_documents) if row["question"]]
    except (SourceError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the data of {source!r} is not here ({reason}). Build it where there is a network with `python "
            f"scripts/build_dataset.py --source {source} --output FOLDER`, or give its official file: --metadata "
            f'\'{{"paths": {{"{source}": "FILE"}}}}\'.'
        ) from error
    if not rows:
        raise ValueError(f"the {split} split of {source!r} has no questions; give another `split` in --metadata.")
    return {"test": datasets.Dataset.from_list(rows, features=FEATURES)}


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
