"""Bad input: an error that names file, place and field, or a counted drop; never a silent loss."""

import gzip
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_builders import FEATURES, RecordError, Report, SourceError, make_row, read_source, validate_row

FIXTURES = Path(__file__).parent / "fixtures"
REPLIQA = (FIXTURES / "repliqa.jsonl").read_bytes().splitlines(keepends=True)
SQUAD = json.loads((FIXTURES / "squad_v2.json").read_text())


def changed(line: bytes, **fields) -> bytes:
    record = json.loads(line) | fields
    return json.dumps({name: value for name, value in record.items() if value is not None}).encode() + b"\n"


# name of the case: (file, content, what the error says, rows kept when dropping, reason of the drop)
LINES = {
    "broken line": (REPLIQA[0] + b'{"document_id": \n' + REPLIQA[1], "line 2: `line` is not JSON", 2, "is not JSON"),
    "not an object": (b"[1]\n" + REPLIQA[1], "line 1: `record` must be an object, got list", 1, "must be an object"),
    "missing field": (REPLIQA[0] + changed(REPLIQA[1], answer=None), "line 2: `answer` is missing", 1, "is missing"),
    "wrong type": (changed(REPLIQA[0], question=7) + REPLIQA[1], "line 1: `question` must be a string, got int", 1,
                   "`question` must be a string"),
    "blank question": (changed(REPLIQA[0], question=" "), "line 1: `question`", 0, "`question`"),
    "empty context": (changed(REPLIQA[0], document_extracted=""), "line 1: `contexts_list`", 0, "`contexts_list`"),
    "not UTF-8": (REPLIQA[0] + REPLIQA[1].replace(b"Who", b"\xff\xfe"), "line 2: `line` is not UTF-8: byte", 1,
                  "is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
def test_bad_lines(tmp_path, case, compressed):
    content, message, kept, reason = LINES[case]
    path = tmp_path / ("repliqa.jsonl.gz" if compressed else "repliqa.jsonl")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(SourceError) as error:
        list(read_source("repliqa", str(path), split="test"))
    assert str(path) in str(error.value)
    assert message in str(error.value)
    report = Report()
    rows = list(read_source("repliqa", str(path), split="test", on_error="drop", report=report))
    assert (len(rows), report.kept, sum(report.dropped.values())) == (kept, kept, 1)
    assert reason in next(iter(report.dropped))


def test_truncated_gzip_keeps_what_came_before(tmp_path):
    lines = b"".join(changed(REPLIQA[0], question_id=f"q{number}") for number in range(5000))
    whole = gzip.compress(lines)
    path = tmp_path / "repliqa.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"repliqa\.jsonl\.gz, line \d+: truncated gzip"):
        list(read_source("repliqa", str(path), split="test"))
    report = Report()
    rows = list(read_source("repliqa", str(path), split="test", on_error="drop", report=report))
    assert 0 < len(rows) < 5000
    assert [row["sample_idx"] for row in rows] == [f"q{number}" for number in range(len(rows))]
    assert report.dropped == {"error: truncated gzip": 1}


@pytest.mark.parametrize("on_error", ["raise", "drop"])
@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("repliqa", "empty.jsonl", b""),
        ("repliqa", "empty.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("repliqa", "blank.jsonl", b"\n\n"),
        ("squad_v2", "empty.json", b""),
        ("squad_v2", "empty.json.gz", gzip.compress(b"", mtime=0)),
        ("msmarco", "empty.json", b""),
        ("text", "empty.txt", b"\n"),
    ],
)
def test_empty_files_are_errors_in_any_case(tmp_path, name, file, content, on_error):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SourceError, match=f"{file}.*is empty"):
        list(read_source(name, str(tmp_path / file), on_error=on_error))


@pytest.mark.parametrize("on_error", ["raise", "drop"])
@pytest.mark.parametrize("name", ["repliqa", "squad_v2", "msmarco", "text", "rows"])
def test_directories_and_missing_files(tmp_path, name, on_error):
    with pytest.raises(SourceError, match="is a directory; name a file, or a pattern"):
        list(read_source(name, str(tmp_path), on_error=on_error))
    with pytest.raises(SourceError, match="does not exist"):
        list(read_source(name, str(tmp_path / "no.jsonl"), on_error=on_error))
    with pytest.raises(SourceError, match="no file matches"):
        list(read_source(name, str(tmp_path / "*.jsonl"), on_error=on_error))


def squad_with(change) -> bytes:
    document = json.loads(json.dumps(SQUAD))
    change(document["data"][0]["paragraphs"][0]["qas"])
    return json.dumps(document).encode()


def only_answer(question):
    """The first answer, the others taken away."""
    del question["answers"][1:]
    return question["answers"][0]


@pytest.mark.parametrize(
    ("change", "message", "reason"),
    [
        (lambda qas: only_answer(qas[0]).update(answer_start=24), "span outside its text: 'Lake Maggiore' at 24",
         "error: `paragraphs[].qas[].answers[].answer_start` span outside its text"),
        (lambda qas: only_answer(qas[0]).update(answer_start=900), "span outside its text", "span outside its text"),
        (lambda qas: only_answer(qas[0]).update(answer_start=-3), "span outside its text", "span outside its text"),
        (lambda qas: only_answer(qas[0]).update(answer_start="23"),
         "answers[0].answer_start` must be an integer, got str", "must be an integer"),
        (lambda qas: qas[0].pop("id"), "paragraphs[0].qas[0].id` is missing", "`paragraphs[].qas[].id` is missing"),
        (lambda qas: qas[0].update(is_impossible=True), "is_impossible` is True, but there are 3 answers", "is True"),
        (lambda qas: qas[1].update(is_impossible=False), "is_impossible` is False, but there are 0 answers",
         "is False"),
        (lambda qas: qas.__setitem__(0, "text"), "paragraphs[0].qas[0]` must be an object, got str",
         "must be an object"),
    ],
)  # fmt: skip
def test_one_bad_question_of_an_article(tmp_path, change, message, reason):
    path = tmp_path / "squad.json"
    path.write_bytes(squad_with(change))
    with pytest.raises(SourceError) as error:
        list(read_source("squad_v2", str(path), split="all"))
    assert f"{path}, record 1 (line 1): `paragraphs[0].qas[" in str(error.value)
    assert message in str(error.value)
    report = Report()
    rows = list(read_source("squad_v2", str(path), split="all", on_error="drop", report=report))
    assert (len(rows), report.read) == (2, 3)
    assert reason in next(iter(report.dropped))


def test_broken_json_documents_name_the_line(tmp_path):
    text = (FIXTURES / "squad_v2.json").read_bytes()
    path = tmp_path / "squad.json"
    path.write_bytes(text.replace(b'{"title": "Novara"', b'{"title": Novara'))
    line = text[: text.index(b'{"title": "Novara"')].count(b"\n") + 1
    with pytest.raises(SourceError, match=rf"squad\.json, line {line}, column \d+: is not JSON"):
        list(read_source("squad_v2", str(path), split="all"))
    report = Report()
    rows = list(read_source("squad_v2", str(path), split="all", on_error="drop", report=report))
    assert [row["sample_idx"] for row in rows] == ["orta-1", "orta-2"]
    assert report.dropped == {"error: is not JSON": 1}


def test_broken_json_documents_name_the_line_beyond_the_first_block(tmp_path):
    articles = [json.dumps(SQUAD["data"][1]) for _ in range(3000)]
    articles[2500] = articles[2500].replace('"Novara"', "Novara")
    path = tmp_path / "squad.json"
    path.write_text('{"data": [\n' + ",\n".join(articles) + "]}")
    assert path.stat().st_size > 5 << 16
    with pytest.raises(SourceError, match=r"squad\.json, line 2502, column 1[0-9]: is not JSON"):
        list(read_source("squad_v2", str(path), split="all"))


@pytest.mark.parametrize(
    ("name", "fixture"),
    [("squad_v2", "squad_v2.json"), ("hotpotqa", "hotpotqa_distractor.json"), ("msmarco", "msmarco.json")],
)
def test_truncated_json_documents(tmp_path, name, fixture):
    text = (FIXTURES / fixture).read_bytes().rstrip()
    path = tmp_path / fixture
    path.write_bytes(text[:-20])
    with pytest.raises(SourceError, match=r"line \d+, column \d+: is not JSON"):
        list(read_source(name, str(path), split="all"))
    (tmp_path / f"{fixture}.gz").write_bytes(gzip.compress(text)[:-60])
    with pytest.raises(SourceError, match="truncated gzip"):
        list(read_source(name, str(tmp_path / f"{fixture}.gz"), split="all"))


def test_records_of_json_documents_are_named_with_their_line(tmp_path):
    articles = [json.dumps(SQUAD["data"][1]) for _ in range(1200)]
    articles[1100] = articles[1100].replace('"novara-1"', "7")
    path = tmp_path / "squad.json.gz"
    path.write_bytes(gzip.compress(('{"data": [\n' + ",\n\n".join(articles) + "]}").encode()))
    for num_proc in (1, 2):
        with pytest.raises(SourceError, match=r"record 1101 \(line 2202\): `paragraphs\[0\].qas\[0\].id` must be"):
            list(read_source("squad_v2", str(path), split="all", on_error="raise", num_proc=num_proc))


def test_json_documents_that_are_not_utf8(tmp_path):
    path = tmp_path / "squad.json"
    path.write_bytes((FIXTURES / "squad_v2.json").read_bytes().replace(b"Piedmont.", b"Piedm\xffnt."))
    with pytest.raises(SourceError, match=r"line \d+, column \d+: is not JSON: .*UTF"):
        list(read_source("squad_v2", str(path), split="all"))


def test_json_documents_of_another_shape(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"version": "v2.0"}')
    with pytest.raises(SourceError, match="holds no record at `data.item`"):
        list(read_source("squad_v2", str(path)))
    with pytest.raises(SourceError, match="holds no column `query_id`"):
        list(read_source("msmarco", str(path)))


def test_msmarco_columns_that_disagree(tmp_path):
    columns = json.loads((FIXTURES / "msmarco.json").read_text())
    del columns["passages"]["1"]
    path = tmp_path / "msmarco.json"
    path.write_text(json.dumps(columns))
    with pytest.raises(SourceError, match="record 2: `passages` has '2' where `query_id` has key '1'"):
        list(read_source("msmarco", str(path), split="all"))


@pytest.mark.parametrize("content", [b"not parquet", b"PAR1"])
def test_broken_parquet(tmp_path, content):
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(SourceError, match=r"rows\.parquet: broken Parquet"):
        list(read_source("rows", str(tmp_path / "rows.parquet"), on_error="drop"))


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"one\n\ncaf\xe9\n")
    with pytest.raises(SourceError, match=r"latin\.txt, line 3: is not UTF-8: byte 3 is 0xe9"):
        list(read_source("text", str(tmp_path / "latin.txt")))


@pytest.mark.parametrize(
    ("line", "column", "value", "message"),
    [
        (0, "document_tokens", [{"token": "a"}], "document_tokens[0].html_token` is missing"),
        (0, "annotations",
         [{"long_answer": {"start_token": 0, "end_token": 90}, "short_answers": [], "yes_no_answer": ""}],
         "`annotations[0].long_answer` span outside its text: [0, 90] of [0, 9]"),
    ],
)  # fmt: skip
def test_natural_questions_spans_and_fields(tmp_path, line, column, value, message):
    record = json.loads((FIXTURES / "natural_questions_original.jsonl").read_text().splitlines()[line])
    path = tmp_path / "nq.jsonl"
    path.write_text(json.dumps(record | {column: value}))
    with pytest.raises(SourceError) as error:
        list(read_source("natural_questions", str(path), split="all"))
    assert message in str(error.value)


GOOD = make_row("rows", "a", "Why?", ["Because.", "Else."], ["Because"], useful=[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "`extra` is not a field of the schema"),
        ({"sample_idx": 3}, "`sample_idx` must be a string"),
        ({"titles_list": [""]}, "`titles_list` must have one title for each of 2 contexts, got 1"),
        ({"contexts_list": []}, "`contexts_list` must hold at least one text"),
        ({"useful_contexts": [2]}, "`useful_contexts` must be distinct indices in [0, 1], got [2]"),
        ({"useful_contexts": [0, 0]}, "`useful_contexts` must be distinct"),
        ({"useful_contexts": [True]}, "`useful_contexts` must be distinct"),
        ({"history": [{"question": "q"}]}, "`history` must be a list of {question, answer}"),
        ({"history": [{"question": "q", "answer": None}]}, "`history` must hold strings only"),
        ({"answers": ["Else", "Because"]}, "`answers` must start with `answer`"),
        ({"answers": []}, "`answers` must start with `answer`"),
        ({"answerable": False}, "`answerable` is False, which contradicts the answer 'Because'"),
        ({"answerable": 1}, "`answerable` must be true or false, got 1"),
        ({"question": ""}, "`question` is empty, so"),
        ({"question": "Why\ud800?"}, "`question` holds half a surrogate pair at character 3"),
    ],
)  # fmt: skip
def test_rows_that_break_the_schema(change, message):
    assert validate_row(GOOD) == GOOD
    with pytest.raises(RecordError) as error:
        validate_row(GOOD | change)
    assert message in str(error.value)


@pytest.mark.parametrize("name", list(FEATURES))
def test_rows_that_lack_a_field(name):
    with pytest.raises(RecordError, match=f"`{name}` is missing"):
        validate_row({field: value for field, value in GOOD.items() if field != name})


def test_errors_survive_a_process_boundary():
    error = pickle.loads(pickle.dumps(SourceError("a.json", "line 2", "is bad", "field")))
    assert (str(error), error.file, error.place, error.field) == (
        "a.json, line 2: is bad",
        "a.json",
        "line 2",
        "field",
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(
        ["repliqa.jsonl", "rows.jsonl", "natural_questions_original.jsonl", "natural_questions_simplified.jsonl"]
    ),
    st.data(),
)
def test_any_damaged_record_is_a_counted_drop_or_a_checked_row(tmp_path_factory, fixture, data):
    record = json.loads((FIXTURES / fixture).read_text().splitlines()[0])
    name = data.draw(st.sampled_from(sorted(record)))
    record[name] = data.draw(json_values)
    path = tmp_path_factory.mktemp("damaged") / "x.jsonl"
    path.write_text(json.dumps(record))
    source = "natural_questions" if fixture.startswith("natural") else fixture.removesuffix(".jsonl")
    report = Report()
    rows = list(read_source(source, str(path), split="all", on_error="drop", report=report))
    assert report.read == 1 == report.kept + sum(report.dropped.values())
    assert all(validate_row(row) == row and set(row) == set(FEATURES) for row in rows)
