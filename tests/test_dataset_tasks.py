"""Training tasks: what they ask can be answered from what they give, and nothing of a text is lost."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_builders import NO_ANSWER, make_row
from dataset_builders.distractors import DistractorPool, chunks, holds
from dataset_builders.splits import normalize
from dataset_builders.tasks import TASKS, make_examples
from dataset_builders.text_tasks import (
    BLANK,
    cloze,
    complete_sentence,
    fill_in_the_middle,
    repeat,
    sentences,
    usable_sentences,
    window,
)

TOWNS = ["Arden", "Brome", "Cleve", "Dorne", "Ely", "Frome", "Goole", "Hythe"]


def town_row(number: int, **changes):
    name, year = TOWNS[number], 1801 + number
    first = f"The bridge of {name} was finished in {year} by the engineer Otto Falk of Vienna. "
    first += "It is made of old oak and iron from Norway."
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


def test_every_task_gives_whole_examples():
    for name in TASKS:
        for example in made(name):
            assert example["task"] == name
            assert len(example["titles"]) == len(example["contexts"])
            assert example["answers"][0] == example["answer"] != ""
            assert example["question"]
            assert all(example["contexts"])
            assert all(0 <= index < len(example["contexts"]) for index in example["useful_contexts"])
        assert made(name)


def test_question_answering_is_the_row():
    (example,) = made("question_answering")
    row = ROWS[0]
    assert (example["contexts"], example["question"]) == (row["contexts_list"], row["question"])
    assert (example["answers"], example["history"]) == (row["answers"], row["history"])


def test_question_in_context_puts_the_question_before_each_context():
    (example,) = made("question_in_context")
    assert example["contexts"] == [f"{ROWS[0]['question']}\n{text}" for text in ROWS[0]["contexts_list"]]
    assert example["question"] == ROWS[0]["question"]


def test_chunks_are_short_hold_the_answer_and_come_with_distractors():
    (example,) = made("chunked_contexts", max_words=9, num_distractors=3)
    assert all(len(chunk.split()) <= 9 for chunk in example["contexts"])
    useful = [example["contexts"][index] for index in example["useful_contexts"]]
    assert useful
    assert all("1801" in chunk for chunk in useful)
    others = [title for title in example["titles"] if title not in ("Arden", "Arden market")]
    assert len(others) == 3 == len(set(others))
    own = [chunk for chunk, title in zip(example["contexts"], example["titles"], strict=True) if title not in others]
    assert sorted(" ".join(own).split()) == sorted(" ".join(ROWS[0]["contexts_list"]).split())
    orders = {tuple(made("chunked_contexts", seed=seed)[0]["titles"]) for seed in range(6)}
    assert len(orders) > 1


def test_chunks_without_a_literal_answer_are_useful_as_a_whole():
    row = town_row(0, answers=["yes"])
    (example,) = made("chunked_contexts", row, max_words=9, num_distractors=0)
    assert {example["titles"][index] for index in example["useful_contexts"]} == {"Arden"}
    assert len(example["useful_contexts"]) == example["titles"].count("Arden") >= 3


def test_no_answer_gives_other_documents_that_do_not_hold_it():
    for seed in range(10):
        (example,) = made("no_answer", seed=seed)
        assert (example["answer"], example["answers"], example["useful_contexts"]) == (NO_ANSWER, [NO_ANSWER], [])
        assert len(example["contexts"]) == 2
        assert not set(example["titles"]) & {"Arden", "Arden market"}
        assert not any("1801" in text for text in example["contexts"])


def test_no_answer_needs_other_documents_and_an_answerable_question():
    assert made("no_answer", rows=ROWS[:1]) == []
    assert made("no_answer", town_row(0, answers=[], useful=[])) == []
    # every other document holds the answer
    assert made("no_answer", town_row(0, answers=["Vienna"])) == []


def test_context_repetition_gives_the_useful_contexts_back():
    (example,) = made("context_repetition")
    assert (example["contexts"], example["answer"]) == (ROWS[0]["contexts_list"][:1], ROWS[0]["contexts_list"][0])
    (example,) = made("context_repetition", max_words=6)
    assert len(example["answer"].split()) == 6
    assert example["answer"] in example["contexts"][0]
    assert example["question"].startswith("Repeat the 6 words")


def test_label_free_tasks_work_on_plain_text_and_question_tasks_do_not():
    row = {**ROWS[0], "question": "", "answer": "", "answers": [], "answerable": False, "useful_contexts": []}
    for name in ("question_answering", "question_in_context", "chunked_contexts", "no_answer"):
        assert made(name, row) == []
    for name in ("context_repetition", "fill_in_the_middle", "cloze", "sentence_completion"):
        assert made(name, row)


TEXT = st.lists(
    st.sampled_from("Anna met Otto. In 1923 seventy travellers left, slowly! Why? x\n y".split(" ")), min_size=1
)
text_strategy = TEXT.map(" ".join).filter(str.strip)


@given(text_strategy, st.integers(0, 99), st.none() | st.integers(3, 12))
def test_fill_in_the_middle_loses_nothing(text, seed, max_words):
    orders = set()
    for question, answer in fill_in_the_middle(text, random.Random(seed), max_words):
        first, *quoted = question.split("\nBefore: " if "\nBefore: " in question else "\n", 1)
        assert first.startswith("Fill in the missing middle")
        before_first = question.index("Before: ") < question.index("After: ")
        orders.add(before_first)
        if before_first:
            before, after = question.split("Before: ", 1)[1].split("\nAfter: ", 1)
        else:
            after, before = question.split("After: ", 1)[1].split("\nBefore: ", 1)
        joined = f"{before} {answer} {after}".split()
        part = window(text, random.Random(seed), max_words).split()
        assert joined == part
        assert answer.strip() == answer != ""


def test_fill_in_the_middle_quotes_either_side_first():
    text = ROWS[0]["contexts_list"][0]
    starts = {fill_in_the_middle(text, random.Random(seed))[0][0].split("\n")[1].split(":")[0] for seed in range(12)}
    assert starts == {"Before", "After"}
    assert fill_in_the_middle("two words", random.Random(0)) == []


@given(text_strategy, st.integers(0, 99))
def test_cloze_answers_stand_where_the_blank_is(text, seed):
    for question, answer in cloze(text, random.Random(seed), count=3):
        sentence = question.removeprefix("Fill in the blank: ")
        assert sentence.count(BLANK) == 1
        assert sentence.replace(BLANK, answer) in usable_sentences(text)
        assert not sentence.startswith(BLANK)


def test_cloze_masks_names_numbers_and_content_words():
    text = ROWS[0]["contexts_list"][0]
    answers = {answer for seed in range(60) for _, answer in cloze(text, random.Random(seed))}
    assert {"1801", "Otto Falk", "Vienna"} <= answers
    assert {"bridge", "finished", "engineer"} & answers
    assert not {"The", "of", "was"} & answers


@given(text_strategy, st.integers(0, 99))
def test_completed_sentences_are_sentences_of_the_text(text, seed):
    for question, answer in complete_sentence(text, random.Random(seed)):
        whole = question.removeprefix("Complete the sentence: ") + " " + answer
        assert any(" ".join(sentence.split()).startswith(whole) for sentence in sentences(text))


@given(text_strategy, st.integers(0, 99), st.none() | st.integers(1, 30))
def test_repetition_asks_for_a_part_of_the_text(text, seed, max_words):
    ((question, answer),) = repeat(text, random.Random(seed), max_words)
    assert answer in text
    assert max_words is None or len(answer.split()) <= max_words
    assert question == "Repeat the text." or " ".join(answer.split()).startswith(question.split(": ", 1)[1])


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
    share = sum(example["task"] == "cloze" for example in make_examples(rows, weights)) / 800
    assert 0.2 < share < 0.3


def test_examples_fall_back_to_another_task_and_take_options():
    plain = [{**ROWS[0], "question": "", "answer": "", "answers": [], "answerable": False}]
    (example,) = make_examples(plain, {"question_answering": 100, "context_repetition": 1})
    assert example["task"] == "context_repetition"
    assert list(make_examples(plain, {"question_answering": 1})) == []
    found = list(make_examples(ROWS, {"cloze": 1}, options={"cloze": {"count": 2}}))
    assert len(found) == 2 * len(ROWS)


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
    with pytest.raises(ValueError, match="must name tasks of"):
        make_examples(ROWS, {"cloze": 1}, options={"fim": {}})
    with pytest.raises(ValueError, match="`weights` must be at least 0, and one of them more"):
        make_examples(ROWS, {"cloze": 0})
    with pytest.raises(ValueError, match="`size` must be at least 2"):
        DistractorPool(1)
    with pytest.raises(ValueError, match="`max_words` must be at least 1"):
        chunks("a", 0)
