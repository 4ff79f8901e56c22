"""FairytaleQA: questions on children's stories, in the official layout or as the one table on the Hub.

Official: questions/train/STORY-questions.csv ("cor_section" names the sections that a question is about, "ex-or-im1"
says whether its answer stands in them) beside section-stories/train/STORY-story.csv ("section", "text"), in a folder
or an archive of github.com/uci-soe/FairytaleQAData; its `val` and `test` parts are not read.
"""

import csv
import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from dataset_builders.fields import get
from dataset_builders.files import Record, SourceError, open_stream
from dataset_builders.schema import Drop, RecordError, Row, make_row

_PART = re.compile(r"(?:.*/)?(questions|section-stories)/train/([^/]+)-(?:questions|story)\.csv")
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def records(path: str) -> Iterator[Record]:
    """The questions at `path`: a folder or archive (.tar.gz, .zip) of the official files, or the Hub's .csv.

    Raises:
        SourceError: none of these, no question in it, a file that is not UTF-8, or questions without their story.
    """
    if path.endswith(".csv"):
        with open_stream(path) as stream:
            for number, record in enumerate(_table(path, stream.read()), start=1):
                yield Record(record.file, record.place, record.content | {"number": number})
        return
    files = {match.groups(): text for name, text in _files(path) if (match := _PART.fullmatch(name))}
    stories = sorted(story for kind, story in files if kind == "questions")
    if not stories:
        raise SourceError(path, "", "holds no questions/train/*-questions.csv")
    for story in stories:
        if ("section-stories", story) not in files:
            raise SourceError(path, story, "has questions, but no section-stories/train/*-story.csv")
        sections: dict[str, str] = {}
        for record in _table(f"{path}, {story}-story.csv", files["section-stories", story]):
            # a section may go on in a second line of the table
            number, text = (get(record.content, name, str) for name in ("section", "text"))
            sections[number.strip()] = f"{sections.get(number.strip(), '')}\n{text}"
        for number, record in enumerate(_table(f"{path}, {story}-questions.csv", files["questions", story]), start=1):
            content = record.content | {"story_name": story, "number": number, "sections": sections}
            yield Record(record.file, record.place, content)


def _files(path: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the .csv files in a folder or an archive."""
    if Path(path).is_dir():
        for file in Path(path).rglob("*.csv"):
            yield file.relative_to(path).as_posix(), file.read_bytes()
    elif path.endswith(_TAR_SUFFIXES):
        with open_stream(path) as stream, tarfile.open(fileobj=stream) as archive:
            # in the order of the archive: seeking back would decompress it again
            for member in archive:
                if member.name.endswith(".csv") and member.isfile():
                    yield member.name.removeprefix("./"), archive.extractfile(member).read()
    elif path.endswith(".zip"):
        with fsspec.open(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
            for name in archive.namelist():
                if name.endswith(".csv"):
                    yield name, archive.read(name)
    else:
        raise SourceError(path, "", "is none of a folder, .tar.gz, .zip or .csv")


def _table(file: str, content: bytes) -> Iterator[Record]:
    try:
        lines = io.StringIO(content.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise SourceError(file, f"byte {error.start}", "is not UTF-8") from None
    for number, row in enumerate(csv.DictReader(lines), start=1):
        yield Record(file, f"row {number}", row)


def convert(record: Any) -> Iterator[Row | Drop | RecordError]:
    """A row for a question: its sections are the contexts, its story is the document."""
    story = get(record, "story_name", str)
    if "sections" in record:
        contexts, kind = list(_sections(record)), "ex-or-im1"
    else:
        contexts, kind = [get(record, "story_section", str)], "ex-or-im"
    names = [name for name in record if re.fullmatch(r"answer\d", name)]
    answers = [record[name] or "" for name in names]
    question_type = get(record, kind, str).strip()
    if question_type not in ("explicit", "implicit"):
        raise RecordError(kind, f"must be explicit or implicit, got {question_type!r}")
    yield make_row(
        "fairytaleqa",
        f"{story}/{record['number']}",
        get(record, "question", str),
        # the files break lines within sentences
        [" ".join(text.split()) for text in contexts],
        answers,
        titles=[story.replace("-", " ")] * len(contexts),
        question_type=question_type,
    )


def _sections(record: dict[str, Any]) -> Iterator[str]:
    for number in get(record, "cor_section", str).split(","):
        if number.strip() not in record["sections"]:
            raise RecordError("cor_section", f"names section {number.strip()!r}, which the story does not have")
        yield record["sections"][number.strip()]
