"""From a source's files to checked rows, in a stream."""

import re
from collections.abc import Iterator

from dataset_builders.files import Record, SourceError
from dataset_builders.schema import Drop, RecordError, Report, Row, validate_row
from dataset_builders.settings import Settings
from dataset_builders.sources import Outcome, Source, get_source
from dataset_builders.splits import check_split


def read_source(
    name: str,
    path: str | None = None,
    split: str = "train",
    seed: int = 0,
    on_error: str = "raise",
    report: Report | None = None,
    settings: Settings | None = None,
) -> Iterator[Row]:
    """Stream the rows of a source.

    Args:
        name: a key of `SOURCES`.
        path: a file, URL or pattern in the source's official format, or a Hub id (`organisation/name`, with
            `:configuration` and `@split` where they matter); None: the source's own default.
        split: "train", "validation", "test" (by document, the same for every seed) or "all".
        on_error: "raise", or "drop" to leave out records that cannot be read and count them.
        report: filled with what was read, kept and dropped, over all splits, as the stream advances.
        settings: the seed together with the options that some sources have; give it or `seed`.

    Raises:
        ValueError: unknown name, split or on_error.
        SourceError: what cannot be read, with file, place and field.
    """
    source = get_source(name)
    if settings is not None and seed not in (0, settings.seed):
        raise ValueError(f"`seed` and `settings.seed` must not differ, got {seed} and {settings.seed}.")
    check_split(split)
    check_on_error(on_error)
    report = report if report is not None else Report()
    rows = checked_rows(source, path, settings or Settings(seed), on_error, report)
    return (row for row in rows if split in ("all", source.split(row)))


def check_on_error(on_error: str) -> None:
    """Raise unless `on_error` is "raise" or "drop"."""
    if on_error not in ("raise", "drop"):
        raise ValueError(f'`on_error` must be "raise" or "drop", got {on_error!r}.')


def checked_rows(source: Source, path: str | None, settings: Settings, on_error: str, report: Report) -> Iterator[Row]:
    """All rows of a source; drops and errors are counted, or raised, as they come."""
    for record in readable_records(source, path, on_error, report):
        for outcome in outcomes(source, record, settings):
            if (row := settle(outcome, record, on_error, report)) is not None:
                yield row


def readable_records(source: Source, path: str | None, on_error: str, report: Report) -> Iterator[Record]:
    """The records of a source, up to a place behind which nothing can be read.

    Raises:
        SourceError: such a place, unless it is to be dropped; a file that is not there or empty, in any case.
    """
    try:
        yield from source.records(path)
    except SourceError as error:
        if on_error == "raise" or not error.place:
            raise
        report.drop(f"error: {error.problem.split(':')[0]}")


def settle(outcome: Outcome, record: Record, on_error: str, report: Report) -> Row | None:
    """Count an outcome; return the row, if it is one.

    Raises:
        SourceError: an unreadable record that is not to be dropped.
    """
    if isinstance(outcome, Drop):
        report.drop(outcome.reason)
        return None
    if isinstance(outcome, RecordError):
        if on_error == "raise":
            raise SourceError(record.file, record.place, str(outcome), outcome.field)
        report.drop(drop_reason(outcome))
        return None
    report.keep()
    return outcome


def outcomes(source: Source, record: Record, settings: Settings) -> Iterator[Outcome]:
    """A checked row, a drop or an error for each question of a record."""
    try:
        for outcome in source.convert(record.value(), settings):
            if isinstance(outcome, dict):
                try:
                    outcome = validate_row(outcome)
                except RecordError as error:
                    outcome = error
            yield outcome
    except RecordError as error:
        yield error


def drop_reason(error: RecordError) -> str:
    """The reason under which an unreadable record is counted: its field and rule, without indices and values."""
    rule = re.split(r"[,:;(]", error.message)[0]
    return f"error: `{re.sub(r'[[][0-9]+[]]', '[]', error.field)}` {rule.strip()}"
