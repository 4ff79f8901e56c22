"""Training tasks: what they ask can be answered from what they give, and nothing of a text is lost."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_builders import NO_ANSWER, make_row, validate_row
from dataset_builders.splits import holds, normalize
from dataset_builders.tasks import PASSAGE_TASKS, TASK_WEIGHTS, TASKS, DistractorPool, chunks, make_examples

TOWNS = ["Arden", "Brome", "Cleve", "Dorne", "Ely", "Frome", "Goole", "Hythe"]


def town_row(number: int, **changes):
    name, year = TOWNS[number], 1801 + number
    first = f"The bridge of {name} was finished in {year} by the engineer Otto Falk of Vienna. "
    first += "It is made of old oak and iron from Norway. It carries carts and people to this day."
    second = f"Many travellers came to {name} for the market, which was held every second Thursday of the month."
    values = {
        "dataset": "rows", "sample_idx": str(number), "question": "When was the bridge finished?",
        "contexts": [first, second], "answers": [str(year), f"in {year}"], "titles": [name, f"{name} market"],
        "useful": [0], "history": [("Is there a bridge?", "Yes.")],
    }  # fmt: skip
    return make_row(**(values | changes))


ROWS = [town_row(number) for number in range(len(TOWNS))]


def pool_of(rows):
    pool = DistractorPool()
    for row in rows:
        pool.add(row)
    return pool


def made(task, row=ROWS[0], seed=0, rows=ROWS, **options):
    return TASKS[task](row, random.Random(seed), pool_of(rows), **options)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_a_row(task):
    found = [made(task, seed=seed) for seed in range(5)]
    for example in filter(None, found):
        assert validate_row(example)["question_type"] == task
        assert (example["dataset"], example["sample_idx"]) == ("rows", "0")
    assert any(found)


def test_question_answering_is_the_row():
    example = made("question_answering")
    row = ROWS[0]
    assert (example["contexts_list"], example["question"]) == (row["contexts_list"], row["question"])
    assert (example["answers"], example["history"]) == (row["answers"], row["history"])


def test_question_in_context_puts_the_question_before_each_context():
    example = made("question_in_context")
    assert example["contexts_list"] == [f"{ROWS[0]['question']}\n{text}" for text in ROWS[0]["contexts_list"]]
    assert example["question"] == ROWS[0]["question"]


def test_chunks_are_short_hold_the_answer_and_come_with_distractors():
    example = made("chunked_contexts", max_words=9, num_distractors=3)
    assert all(len(chunk.split()) <= 9 for chunk in example["contexts_list"])
    useful = [example["contexts_list"][index] for index in example["useful_contexts"]]
    assert useful
    assert all("1801" in chunk for chunk in useful)
    others = [title for title in example["titles_list"] if title not in ("Arden", "Arden market")]
    assert len(others) == 3 == len(set(others))
    own = [
        chunk
        for chunk, title in zip(example["contexts_list"], example["titles_list"], strict=True)
        if title not in others
    ]
    assert sorted(" ".join(own).split()) == sorted(" ".join(ROWS[0]["contexts_list"]).split())
    orders = {tuple(made("chunked_contexts", seed=seed)["titles_list"]) for seed in range(6)}
    assert len(orders) > 1


def test_chunks_without_a_literal_answer_are_useful_as_a_whole():
    row = town_row(0, answers=["yes"])
    example = made("chunked_contexts", row, max_words=9, num_distractors=0)
    assert {example["titles_list"][index] for index in example["useful_contexts"]} == {"Arden"}
    assert len(example["useful_contexts"]) == example["titles_list"].count("Arden") >= 3


def test_no_answer_gives_other_documents_that_do_not_hold_it():
    for seed in range(10):
        example = made("no_answer", seed=seed)
        assert (example["answer"], example["answers"], example["useful_contexts"]) == (NO_ANSWER, [NO_ANSWER], [])
        assert len(example["contexts_list"]) == 2
        assert not set(example["titles_list"]) & {"Arden", "Arden market"}
        assert not any("1801" in text for text in example["contexts_list"])


def test_no_answer_needs_other_documents_and_an_answerable_question():
    assert made("no_answer", rows=ROWS[:1]) is None
    assert made("no_answer", town_row(0, answers=[], useful=[])) is None
    # every other document holds the answer
    assert made("no_answer", town_row(0, answers=["Vienna"])) is None


@pytest.mark.parametrize("task", PASSAGE_TASKS)
def test_passage_tasks_ask_of_one_useful_context(task):
    row = town_row(0, useful=[1, 0])
    found = [example for seed in range(30) if (example := made(task, row, seed))]
    assert {example["contexts_list"][0] for example in found} <= set(row["contexts_list"])
    for example in found:
        assert len(example["contexts_list"]) == 1
        assert example["answer"] in example["contexts_list"][0]
        assert (example["history"], example["useful_contexts"], example["answerable"]) == ([], [0], True)


def test_passage_tasks_work_on_plain_text_and_question_tasks_do_not():
    row = {**ROWS[0], "question": "", "answer": "", "answers": [], "answerable": False, "useful_contexts": []}
    for task in TASKS.keys() - PASSAGE_TASKS.keys():
        assert made(task, row) is None
    for task in PASSAGE_TASKS:
        assert any(made(task, row, seed) for seed in range(9))


TEXT = st.lists(
    st.sampled_from("Anna met Otto. In 1923 seventy travellers left, slowly! Why? x\n y".split(" ")), min_size=1
)
text_strategy = TEXT.map(" ".join).filter(str.strip)


@given(text_strategy, st.integers(1, 12))
def test_chunks_lose_no_word(text, max_words):
    pieces = chunks(text, max_words)
    assert " ".join(pieces).split() == text.split()
    assert all(1 <= len(piece.split()) <= max_words for piece in pieces)


def test_answers_are_looked_for_as_whole_words():
    assert holds("It opened in 1895.", "1895")
    assert not holds("It opened in 18955.", "1895")
    assert not holds("Yes, it did.", "yes")


def test_examples_follow_the_weights_and_the_seed():
    weights = {"question_answering": 3, "cloze": 1}
    first = list(make_examples(ROWS * 40, weights, seed=1))
    assert first == list(make_examples(ROWS * 40, weights, seed=1))
    assert first != list(make_examples(ROWS * 40, weights, seed=2))
    rows = [town_row(n % 8, sample_idx=str(n)) for n in range(800)]
    share = sum(example["question_type"] == "cloze" for example in make_examples(rows, weights)) / 800
    assert 0.2 < share < 0.3


def test_examples_fall_back_to_another_task():
    plain = [{**ROWS[0], "question": "", "answer": "", "answers": [], "answerable": False}]
    (example,) = make_examples(plain, {"question_answering": 100, "repetition": 1})
    assert example["question_type"] == "repetition"
    assert list(make_examples(plain, {"question_answering": 1})) == []


def test_the_weights_of_the_published_mix_are_shares_of_known_tasks():
    assert TASK_WEIGHTS.keys() <= TASKS.keys()
    assert sum(TASK_WEIGHTS.values()) == pytest.approx(1)
    rows = [town_row(n % 8, sample_idx=str(n)) for n in range(400)]
    assert {example["question_type"] for example in make_examples(rows, TASK_WEIGHTS)} == set(TASK_WEIGHTS)


def test_the_first_rows_of_a_stream_have_distractors_too():
    found = list(make_examples(iter(ROWS), {"no_answer": 1}, pool_size=4))
    assert [example["sample_idx"] for example in found] == [str(number) for number in range(len(ROWS))]


def test_the_pool_forgets_and_skips_the_own_document():
    pool = DistractorPool(size=3)
    for row in ROWS:
        pool.add(row)
        pool.add(row)
    assert len(pool) == 3
    titles = [title for title, _ in pool.draw(ROWS[7], 9, random.Random(0))]
    assert sorted(titles) == ["Frome", "Goole"]
    assert all(normalize(title) != "hythe" for title in titles)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="must name tasks of .*got qa"):
        make_examples(ROWS, {"qa": 1})
    with pytest.raises(ValueError, match="`weights` must be at least 0, and one of them more"):
        make_examples(ROWS, {"cloze": 0})
    with pytest.raises(ValueError, match="`size` must be at least 2"):
        DistractorPool(1)
    with pytest.raises(ValueError, match="`max_words` must be at least 1"):
        chunks("a", 0)
