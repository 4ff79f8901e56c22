"""Sources read from the Hugging Face Hub: `organisation/name`, with `:configuration` and `@split`."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import datasets

from dataset_builders.files import Record, SourceError

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.+-]+))?")
_FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".gz", ".whl")


@dataclass(frozen=True)
class HubLocation:
    """Where a source lives on the Hub, and what of it is read by default."""

    repo: str
    config: str | None = None
    split: str = "train"


def parse_hub_id(path: str) -> HubLocation | None:
    """`path` as a place on the Hub; None when it names a file."""
    match = _HUB_ID.fullmatch(path)
    if match is None or os.path.exists(path) or path.endswith(_FILE_SUFFIXES) or "*" in path:
        return None
    return HubLocation(match["repo"], match["config"], match["split"] or "")


def hub_records(location: HubLocation, default: HubLocation | None = None) -> Iterator[Record]:
    """Stream the rows of a Hub data set; what `location` leaves open is taken from `default`.

    Raises:
        SourceError: no such repository, configuration or split, or no access to it.
    """
    config = location.config or (default.config if default else None)
    split = location.split or (default.split if default else "train")
    name = f"{location.repo}{':' + config if config else ''}@{split}"
    try:
        rows = datasets.load_dataset(location.repo, config, split=split, streaming=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise SourceError(name, "", f"cannot be read from the Hub: {str(error).splitlines()[0]}") from error
    count = 0
    for count, row in enumerate(rows, start=1):
        yield Record(name, f"row {count}", row)
    if not count:
        raise SourceError(name, "", "is empty")
