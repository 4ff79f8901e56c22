"""From a source's files to checked rows, in a stream, by one process or several."""

import re
from collections.abc import Iterable, Iterator

from dataset_builders.files import Record, SourceError, expand_paths
from dataset_builders.parallel import blocks, check_num_proc, ordered_map
from dataset_builders.schema import Drop, RecordError, Report, Row, validate_row
from dataset_builders.settings import Settings
from dataset_builders.sources import Outcome, Source, get_source
from dataset_builders.splits import check_split

# records handed to a worker at a time
_BLOCK_RECORDS = 16


def read_source(
    name: str,
    path: str | None = None,
    split: str = "train",
    seed: int = 0,
    on_error: str = "raise",
    report: Report | None = None,
    settings: Settings | None = None,
    num_proc: int = 1,
) -> Iterator[Row]:
    """Stream the rows of a source, in the order of its files.

    Args:
        name: a key of `SOURCES`.
        path: a file, URL or pattern in the source's official format, or a Hub id (`organisation/name`, with
            `:configuration` and `@split` where they matter); None: the source's own default.
        split: "train", "validation", "dev", "test" (by document, the same for every seed) or "all".
        on_error: "raise", or "drop" to leave out records that cannot be read and count them.
        report: filled with what was read, kept and dropped, over all splits, as the stream advances.
        settings: the seed together with the options that some sources have; give it or `seed`.
        num_proc: processes that parse and convert; the rows and their order do not depend on it.

    Raises:
        ValueError: unknown name, split or on_error.
        SourceError: what cannot be read, with file, place and field.
    """
    source = get_source(name)
    if settings is not None and seed not in (0, settings.seed):
        raise ValueError(f"`seed` and `settings.seed` must not differ, got {seed} and {settings.seed}.")
    check_split(split)
    check_on_error(on_error)
    check_num_proc(num_proc)
    report = report if report is not None else Report()
    records = readable_records(source, path, on_error, report)
    rows = checked_rows(source, records, settings or Settings(seed), on_error, report, num_proc)
    return (row for row in rows if split in ("all", source.split(row)))


def check_on_error(on_error: str) -> None:
    """Raise unless `on_error` is "raise" or "drop"."""
    if on_error not in ("raise", "drop"):
        raise ValueError(f'`on_error` must be "raise" or "drop", got {on_error!r}.')


def checked_rows(
    source: Source, records: Iterable[Record], settings: Settings, on_error: str, report: Report, num_proc: int = 1
) -> Iterator[Row]:
    """All rows of `records`; drops and errors are counted, or raised, as they come."""
    if num_proc == 1:
        settled = ((record, outcomes(source, record, settings)) for record in records)
    else:
        done = ordered_map(
            _convert_block, blocks(records, _BLOCK_RECORDS), num_proc, _start_worker, (source.name, settings)
        )
        settled = (entry for block in done for entry in block)
    for record, found in settled:
        for outcome in found:
            if (row := settle(outcome, record, on_error, report)) is not None:
                yield row


_worker: tuple[Source, Settings] | None = None


def _start_worker(name: str, settings: Settings) -> None:
    global _worker
    _worker = get_source(name), settings


def _convert_block(records: list[Record]) -> list[tuple[Record, list[Outcome]]]:
    source, settings = _worker
    return [(record.without_content(), list(outcomes(source, record, settings))) for record in records]


def readable_records(source: Source, path: str | None, on_error: str, report: Report) -> Iterator[Record]:
    """The records of a source, each file up to a place behind which nothing in it can be read.

    Raises:
        SourceError: such a place, unless it is to be dropped; a file that is not there or empty, in any case.
    """
    for file in expand_paths(path) if path and "*" in path else [path]:
        try:
            yield from source.records(file)
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
            raise SourceError(record.file, record.located(), str(outcome), outcome.field)
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
    field = re.sub(r"\[\d+\]", "[]", error.field)
    return f"error: `{field}` {rule.strip()}"
