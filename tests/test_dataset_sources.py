"""Every source parsed from a hand-written fixture in its official format to exact rows."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dataset_builders import NO_ANSWER, Report, Settings, SourceError, read_source
from dataset_builders.natural_questions import read_nq_open

FIXTURES = Path(__file__).parent / "fixtures"


def expected(dataset, sample_idx, question, contexts, answers, titles, useful, history=(), question_type=""):
    """A row written out, without the code under test."""
    return {
        "sample_idx": sample_idx,
        "dataset": dataset,
        "titles_list": titles,
        "contexts_list": contexts,
        "useful_contexts": useful,
        "question": question,
        "history": [{"question": q, "answer": a} for q, a in history],
        "answer": answers[0],
        "answers": answers,
        "answerable": answers != [NO_ANSWER],
        "question_type": question_type,
    }


def read(name, path, **options):
    report = Report()
    rows = list(read_source(name, str(path), split="all", report=report, **options))
    assert report.kept == len(rows)
    assert report.read == report.kept + sum(report.dropped.values())
    return rows, report.dropped


ORTA = "Lake Orta lies west of Lake Maggiore. Its largest island, San Giulio, holds a basilica."
SQUAD_V2_ROWS = [
    expected(
        "squad_v2",
        "orta-1",
        "Which lake lies east of Lake Orta?",
        [ORTA],
        ["Lake Maggiore", "Maggiore"],
        ["Lake Orta"],
        [0],
    ),
    expected("squad_v2", "orta-2", "How deep is Lake Orta?", [ORTA], [NO_ANSWER], ["Lake Orta"], []),
    expected(
        "squad_v2", "novara-1", "Where is Novara?", ["Novara is a city in Piedmont."], ["Piedmont"], ["Novara"], [0]
    ),
]


def test_squad_v2():
    assert read("squad_v2", FIXTURES / "squad_v2.json") == (SQUAD_V2_ROWS, {})


def test_squad_v1():
    row = expected(
        "squad_v1",
        "quito-1",
        "What is the capital of Ecuador?",
        ["Quito is the capital of Ecuador."],
        ["Quito"],
        ["Quito"],
        [0],
    )
    assert read("squad_v1", FIXTURES / "squad_v1.json") == ([row], {})


def test_squad_rows_of_the_hub(tmp_path):
    rows = [
        {"id": "orta-1", "title": "Lake_Orta", "context": ORTA, "question": "Which lake lies east of Lake Orta?",
         "answers": {"text": ["Lake Maggiore", "Maggiore"], "answer_start": [23, 28]}},
        {"id": "orta-2", "title": "Lake_Orta", "context": ORTA, "question": "How deep is Lake Orta?",
         "answers": {"text": [], "answer_start": []}},
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert read("squad_v2", tmp_path / "train.parquet") == (SQUAD_V2_ROWS[:2], {})


def test_hotpotqa_shuffles_paragraphs_the_same_way_for_a_seed():
    path = FIXTURES / "hotpotqa_distractor.json"
    texts = {
        "Alpha Ferry": "The Alpha Ferry opened in 1901. It crosses the Gamma.",
        "Beta Bridge": "The Beta Bridge crosses the Gamma. It opened in 1932.",
        "Delta Tunnel": "The Delta Tunnel is closed.",
    }
    rows, dropped = read("hotpotqa", path, settings=Settings(seed=1, num_copies=3))
    assert dropped == {}
    assert [row["sample_idx"] for row in rows] == ["5a7a0693", "5a7a0693-1", "5a7a0693-2"]
    assert rows == read("hotpotqa", path, settings=Settings(seed=1, num_copies=3))[0]
    orders = set()
    for row in rows:
        assert dict(zip(row["titles_list"], row["contexts_list"], strict=True)) == texts
        assert {row["titles_list"][index] for index in row["useful_contexts"]} == {"Alpha Ferry", "Beta Bridge"}
        assert (row["answer"], row["answers"], row["answerable"]) == ("the Alpha Ferry", ["the Alpha Ferry"], True)
        orders.add(tuple(row["titles_list"]))
    assert len(orders) > 1
    seeds = {tuple(read("hotpotqa", path, seed=seed)[0][0]["titles_list"]) for seed in range(8)}
    assert len(seeds) > 1


def test_hotpotqa_fullwiki_keeps_the_reference_answer_without_its_paragraph():
    rows, dropped = read("hotpotqa_fullwiki", FIXTURES / "hotpotqa_fullwiki.json")
    question = "In which country was the maker of the Omega Clock born?"
    contexts = ["The Omega Clock was made by Ola Berg."]
    assert rows == [expected("hotpotqa_fullwiki", "5ab3f1c0", question, contexts, ["Norway"], ["Omega Clock"], [0])]
    assert dropped == {"no answer given (test set)": 1}


def test_hotpotqa_rows_of_the_hub(tmp_path):
    official = json.loads((FIXTURES / "hotpotqa_distractor.json").read_text())[0]
    row = {
        "id": official["_id"],
        "question": official["question"],
        "answer": official["answer"],
        "supporting_facts": {"title": ["Alpha Ferry", "Beta Bridge"], "sent_id": [0, 1]},
        "context": {"title": [t for t, _ in official["context"]], "sentences": [s for _, s in official["context"]]},
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "train.parquet")
    assert read("hotpotqa", tmp_path / "train.parquet") == read("hotpotqa", FIXTURES / "hotpotqa_distractor.json")


def test_topiocqa():
    text, title = "The Night Watch is a 1642 painting by Rembrandt.", "The Night Watch"
    first, second = ("who painted the night watch?", "Rembrandt"), ("when?", "1642")
    rows = [
        expected("topiocqa", "7-1", first[0], [text], ["Rembrandt"], [title], [0]),
        expected("topiocqa", "7-2", "when?", [text], ["1642", "in 1642"], [title], [0], [first]),
        expected("topiocqa", "7-3", "what did it cost?", [text], [NO_ANSWER], [title], [], [first, second]),
    ]
    assert read("topiocqa", FIXTURES / "topiocqa.json") == (rows, {})


def test_msmarco():
    passages = ["Ropes are tied with knots.", "A knot is a unit of speed: one nautical mile an hour."]
    answers = ["A knot is one nautical mile an hour.", "In sailing, a knot is one nautical mile an hour."]
    rows = [
        expected("msmarco", "19699", "what is a knot in sailing", passages, answers, ["", ""], [1]),
        expected("msmarco", "19700", "how old is the moon", ["Tides follow the moon."], [NO_ANSWER], [""], []),
    ]
    assert read("msmarco", FIXTURES / "msmarco.json") == (rows, {"no answer given": 1})


def test_msmarco_rows_of_the_hub(tmp_path):
    columns = json.loads((FIXTURES / "msmarco.json").read_text())
    rows = []
    for key in ("0", "1"):
        passages = columns["passages"][key]
        row = {name: columns[name][key] for name in ("query", "query_id", "query_type", "answers")}
        row["passages"] = {name: [passage[name] for passage in passages] for name in ("is_selected", "passage_text")}
        well_formed = columns["wellFormedAnswers"][key]
        rows.append(row | {"wellFormedAnswers": well_formed if isinstance(well_formed, list) else []})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert read("msmarco", tmp_path / "train.parquet")[0] == read("msmarco", FIXTURES / "msmarco.json")[0]


KIEL = "The Kiel Canal links the North Sea and the Baltic . It opened in 1895 ."
TOLL = "Ships pay a toll ."


def test_natural_questions_simplified():
    name, title = "natural_questions", ["Kiel Canal"]
    rows = [
        expected(name, "5655", "when was the kiel canal opened", [KIEL], ["1895"], title, [0]),
        expected(name, "5656", "do ships pay on the kiel canal", [TOLL], ["yes"], title, [0]),
        expected(name, "5657", "who dug the kiel canal", [TOLL], [NO_ANSWER], title, []),
    ]
    dropped = {"long answer only": 1, "no long answer, and no other passage": 1}
    assert read(name, FIXTURES / "natural_questions_simplified.jsonl") == (rows, dropped)


def test_natural_questions_keeps_what_is_in_nq_open():
    settings = Settings(nq_open=read_nq_open(str(FIXTURES / "nq_open.jsonl")))
    rows, dropped = read("natural_questions", FIXTURES / "natural_questions_simplified.jsonl", settings=settings)
    assert [row["sample_idx"] for row in rows] == ["5655"]
    assert dropped == {"not in NQ-open": 4}


MONA_LISA = ["Mona Lisa was by da Vinci ."]


def test_natural_questions_original_needs_two_of_five_annotators():
    rows = [
        expected(
            "natural_questions",
            "797803",
            "who painted the mona lisa",
            MONA_LISA,
            ["da Vinci", "Vinci"],
            ["Mona Lisa"],
            [0],
        ),
        expected(
            "natural_questions",
            "797804",
            "how big is the mona lisa",
            ["Mona Lisa was"],
            [NO_ANSWER],
            ["Mona Lisa"],
            [],
        ),
    ]
    assert read("natural_questions", FIXTURES / "natural_questions_original.jsonl") == (rows, {})


def test_natural_questions_rows_of_the_hub(tmp_path):
    original = json.loads((FIXTURES / "natural_questions_original.jsonl").read_text().splitlines()[0])
    tokens = original["document_tokens"]
    row = {
        "id": str(original["example_id"]),
        "document": {
            "title": "Mona Lisa",
            "tokens": {"token": [t["token"] for t in tokens], "is_html": [t["html_token"] for t in tokens]},
        },
        "question": {"text": original["question_text"], "tokens": []},
        "long_answer_candidates": {"start_token": [0], "end_token": [9], "top_level": [True]},
        "annotations": {
            "long_answer": [a["long_answer"] for a in original["annotations"]],
            "short_answers": [
                {name: [s[name] for s in a["short_answers"]] for name in ("start_token", "end_token")}
                for a in original["annotations"]
            ],
            "yes_no_answer": [-1] * 5,
        },
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "train.parquet")
    official = read("natural_questions", FIXTURES / "natural_questions_original.jsonl")[0]
    assert read("natural_questions", tmp_path / "train.parquet")[0] == official[:1]


def test_repliqa():
    text, title = ["The Marlow library reopened on 3 May after a flood."], ["kylrsbjx"]
    rows = [
        expected("repliqa", "kylrsbjx-q1", "Why had the library closed?", text, ["A flood."], title, [0]),
        expected("repliqa", "kylrsbjx-q2", "Who paid for the repairs?", text, [NO_ANSWER], title, []),
    ]
    assert read("repliqa", FIXTURES / "repliqa.jsonl") == (rows, {})
    assert [row["sample_idx"] for row in read_source("repliqa", str(FIXTURES / "repliqa.jsonl"), split="train")] == []


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_rows_in_the_schema(tmp_path, suffix):
    rows = [json.loads(line) for line in (FIXTURES / "rows.jsonl").read_text().splitlines()]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress((FIXTURES / "rows.jsonl").read_bytes()))
    else:
        path.write_bytes((FIXTURES / "rows.jsonl").read_bytes())
    assert read("rows", path) == (rows, {})


def test_rows_of_an_evaluation_only_source_stay_out_of_training(tmp_path):
    rows = [row | {"dataset": "squad_sample"} for row in SQUAD_V2_ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert list(read_source("rows", str(tmp_path / "rows.jsonl"), split="train")) == []
    assert list(read_source("rows", str(tmp_path / "rows.jsonl"), split="test")) == rows


def test_plain_text_one_paragraph_a_row():
    path = str(FIXTURES / "text.txt")
    rows, _ = read("text", path)
    assert [row["contexts_list"] for row in rows] == [
        ["The first paragraph\nhas two lines."],
        ["The second has one: café."],
    ]
    assert [row["sample_idx"] for row in rows] == [f"{path}:1", f"{path}:2"]
    assert all(row["titles_list"] == ["text.txt"] and row["question"] == "" and not row["answerable"] for row in rows)


def test_files_by_pattern_and_compressed(tmp_path):
    lines = (FIXTURES / "repliqa.jsonl").read_bytes().splitlines(keepends=True)
    for index, line in enumerate(lines):
        (tmp_path / f"part-{index}.jsonl.gz").write_bytes(gzip.compress(line))
    assert read("repliqa", tmp_path / "part-*.jsonl.gz") == read("repliqa", FIXTURES / "repliqa.jsonl")


def test_other_filesystems():
    import fsspec

    with fsspec.open("memory://squad/squad_v2.json", "wb") as stream:
        stream.write((FIXTURES / "squad_v2.json").read_bytes())
    assert read("squad_v2", "memory://squad/squad_v2.json") == (SQUAD_V2_ROWS, {})


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match="`name` must be one of .*squad_v2.*got 'squad3'"):
        read_source("squad3")
    with pytest.raises(ValueError, match="`split` must be one of"):
        read_source("squad_v2", "x.json", split="held")
    with pytest.raises(ValueError, match="`on_error` must be"):
        read_source("squad_v2", "x.json", on_error="ignore")
    with pytest.raises(ValueError, match="needs `path`"):
        list(read_source("text"))
    with pytest.raises(ValueError, match="has no default"):
        list(read_source("rows"))
    with pytest.raises(ValueError, match="`num_copies` must be at least 1"):
        Settings(num_copies=0)
    with pytest.raises(SourceError, match="expected suffixes"):
        list(read_source("squad_v2", str(FIXTURES / "text.txt")))
