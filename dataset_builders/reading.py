"""From a source's files to checked rows, in a stream, by one process or several, whose number changes nothing."""

import multiprocessing
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import Any

from dataset_builders.fields import Settings
from dataset_builders.files import Record, SourceError, expand_paths
from dataset_builders.schema import ERROR, Drop, RecordError, Repair, Report, Row, validate_row
from dataset_builders.sources import Outcome, Source, get_source
from dataset_builders.splits import check_split

# records handed to a worker at a time
_BLOCK_RECORDS = 16
# of the questions read, how many may fail when `on_error` is "limit", and how often that is looked at
FAILED_SHARE, _LOOK_EVERY = 0.01, 10_000


def read_source(
    name: str,
    path: str | None = None,
    split: str = "train",
    seed: int = 0,
    on_error: str = "limit",
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
        on_error: what happens to records that cannot be read: "limit" leaves them out and counts them, and stops where
            more than 1 % fail (looked at every 10,000 questions and at the end); "drop" never stops; "raise" stops at
            the first. A file that breaks off, behind which nothing can be counted, is left out by "drop" alone.
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
    if num_proc < 1:
        raise ValueError(f"`num_proc` must be at least 1, got {num_proc}.")
    report = report if report is not None else Report()
    records = readable_records(source, path, on_error, report)
    rows = checked_rows(source, records, settings or Settings(seed), on_error, report, num_proc)
    return (row for row in rows if split in ("all", source.split(row)))


def check_on_error(on_error: str) -> None:
    """Raise unless `on_error` is "limit", "raise" or "drop"."""
    if on_error not in ("limit", "raise", "drop"):
        raise ValueError(f'`on_error` must be "limit", "raise" or "drop", got {on_error!r}.')


def checked_rows(
    source: Source, records: Iterable[Record], settings: Settings, on_error: str, report: Report, num_proc: int = 1
) -> Iterator[Row]:
    """All rows of `records`; drops and errors are counted, or raised, as they come."""
    if num_proc == 1:
        settled = ((record, outcomes(source, record, settings)) for record in records)
    else:
        done = ordered_map(_convert_block, _blocks(records), num_proc, _start_worker, (source.name, settings))
        settled = (entry for block in done for entry in block)
    names, first = UniqueNames(), None
    for record, found in settled:
        for outcome in found:
            if isinstance(outcome, RecordError):
                first = first or (record.without_content(), outcome)
                if on_error == "raise":
                    raise _source_error(*first)
            if (row := _settle(outcome, names, report)) is not None:
                yield row
            if on_error == "limit" and report.read % _LOOK_EVERY == 0:
                _check_failed(report, first)
    if on_error == "limit":
        _check_failed(report, first)


def _blocks(records: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(records)
    while block := list(islice(iterator, _BLOCK_RECORDS)):
        yield block


def ordered_map(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    num_proc: int,
    initializer: Callable[..., None],
    initargs: tuple[Any, ...],
) -> Iterator[Any]:
    """`function` of each item, in order, computed by `num_proc` processes, at most two items ahead for each."""
    context = _context()
    with ProcessPoolExecutor(num_proc, context, initializer, initargs) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _context() -> multiprocessing.context.BaseContext:
    """Processes that are not forked from this one, which may have threads (fsspec has), but from a clean one."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # imported once, not once a worker
    context.set_forkserver_preload(["dataset_builders.reading"])
    return context


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
            if on_error != "drop" or not error.place:
                raise
            report.drop(ERROR + error.problem.split(":")[0])


def _settle(outcome: Outcome, names: "UniqueNames", report: Report) -> Row | None:
    """Count an outcome; return the row, if it is one."""
    if isinstance(outcome, Drop):
        report.drop(outcome.reason)
    elif isinstance(outcome, Repair):
        report.repair(outcome.reason)
    elif isinstance(outcome, RecordError):
        report.drop(ERROR + outcome.reason)
    else:
        report.keep()
        unique = names.unique(outcome["dataset"], outcome["sample_idx"])
        if unique != outcome["sample_idx"]:
            report.repair("`sample_idx` was there before")
            return outcome | {"sample_idx": unique}
        return outcome
    return None


class UniqueNames:
    """Makes ids unique: the second "a" becomes "a#2". They are kept in a temporary file, so memory does not grow."""

    def __init__(self):
        self._table = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        # lost with the process in any case
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("CREATE TABLE names (space, name, count, PRIMARY KEY (space, name)) WITHOUT ROWID")

    def unique(self, space: str, name: str) -> str:
        """`name`, or `name` with the first free number behind it."""
        count = "INSERT INTO names VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET count = count + 1 RETURNING count"
        candidate = name
        while (number := self._table.execute(count, (space, candidate)).fetchone()[0]) > 1:
            name, candidate = candidate, f"{candidate}#{number}"
        return candidate


def _source_error(record: Record, error: RecordError) -> SourceError:
    return SourceError(record.file, record.located(), str(error), error.field)


def too_many_failed(report: Report) -> str:
    """What is wrong where more than `FAILED_SHARE` of the questions failed; "" where not."""
    if report.failed <= FAILED_SHARE * report.read:
        return ""
    return f"{report.failed} of {report.read} questions failed, more than {FAILED_SHARE:.0%}"


def _check_failed(report: Report, first: tuple[Record, RecordError] | None) -> None:
    if first and (problem := too_many_failed(report)):
        error = _source_error(*first)
        raise SourceError(error.file, error.place, f"{error.problem} ({problem})", error.field)


def outcomes(source: Source, record: Record, settings: Settings) -> Iterator[Outcome]:
    """A checked row, a drop or an error for each question of a record."""
    try:
        for outcome in source.convert(record.value(), *([settings] if source.with_settings else [])):
            if isinstance(outcome, dict):
                try:
                    outcome = validate_row(outcome)
                except RecordError as error:
                    outcome = error
            yield outcome
    except RecordError as error:
        yield error
