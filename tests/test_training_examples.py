"""Examples: what is asked of a passage, and that a step is a function of its number."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_builders.tasks import PASSAGE_TASKS, cloze, completion, infilling, phrases, sentences
from xcllama.training.collator import answer_places
from xcllama.training.examples import BUCKET_STEPS, ExamplePlan
from xcllama.training.passages import Passage, Question
from xcllama.training.recipe import recipe_from_dict
from xcllama.training.renaming import rename, with_renamed

PASSAGE = (
    "Ada Lovelace was born in London on 10 December 1815. She met Charles Babbage at a party in June 1833. "
    "Her notes on the Analytical Engine were published in Taylor's Scientific Memoirs. They hold what many call the "
    "first computer program, seven steps long."
)


def recipe(**data):
    """A recipe of all tasks over two sources."""
    tasks = {"answer": 1, "question": 1, "cloze": 1, "completion": 1, "infilling": 1, "repetition": 1}
    return recipe_from_dict(
        {
            "name": "tiny",
            "model": {"base": "nowhere"},
            "data": {"sources": {"drop": 1, "boolq": 1}, "tasks": tasks} | data,
            "optimization": {"steps": 4, "passages_per_step": 4, "questions_per_passage": 2},
        }
    )


def passages(count: int = 12) -> list[Passage]:
    """Passages with one or two questions each, from two sources."""
    made = []
    for index in range(count):
        source = "drop" if index % 2 else "boolq"
        questions = [Question(f"What is {index}?", f"{index}", source), Question("Why?", "no reason", source)]
        made.append(Passage(f"Passage {index}. {PASSAGE}", source, questions[: 1 + index % 2]))
    return made


@pytest.mark.parametrize("task", PASSAGE_TASKS)
def test_answers_stand_in_the_passage(task):
    found = [PASSAGE_TASKS[task](PASSAGE, random.Random(seed)) for seed in range(60)]
    assert sum(pair is not None for pair in found) > 50
    assert all(pair[1] in PASSAGE for pair in found if pair)


def test_a_filled_blank_is_the_passage_again():
    for seed in range(60):
        text, answer = cloze(PASSAGE, random.Random(seed))
        assert text.removeprefix("Fill in the blank: ").replace("____", answer) in PASSAGE


def test_phrases_are_whole():
    found = [sentence[start:end] for sentence in sentences(PASSAGE) for start, end in phrases(sentence)]
    assert {"party", "Analytical Engine", "Taylor's Scientific Memoirs", "first computer program"} <= set(found)
    assert not [phrase for phrase in found if phrase.split()[0].lower() in ("the", "in", "of", "was", "her")]


def test_a_completion_goes_on_where_its_start_ends():
    for seed in range(30):
        start, end = completion(PASSAGE, random.Random(seed))
        assert f"{start.removeprefix('Complete the sentence: ')} {end}" in PASSAGE


def test_infilling_does_not_show_the_answer():
    for seed in range(30):
        text, answer = infilling(PASSAGE, random.Random(seed))
        assert answer not in text


@given(text=st.text(max_size=300), seed=st.integers(0, 1000), task=st.sampled_from(sorted(PASSAGE_TASKS)))
def test_any_text_gives_a_question_or_nothing(text, seed, task):
    pair = PASSAGE_TASKS[task](text, random.Random(seed))
    assert pair is None or (pair[0].strip() and pair[1].strip())


def test_steps_depend_on_their_number_alone():
    first, second = ExamplePlan(passages(), recipe()), ExamplePlan(passages(), recipe())
    forward = [first.step(number) for number in range(2 * BUCKET_STEPS)]
    assert [second.step(number) for number in reversed(range(2 * BUCKET_STEPS))][::-1] == forward
    assert forward[0] != forward[BUCKET_STEPS]
    keys = [example.key for step in forward for group in step for example in group]
    assert len(set(keys)) == len(keys)


def test_every_step_has_its_passages_and_every_task_occurs():
    plan = ExamplePlan(passages(), recipe())
    seen = set()
    for number in range(BUCKET_STEPS):
        groups = plan.step(number)
        assert len(groups) == 4
        for group in groups:
            assert 1 <= len(group) <= 2
            assert len({example.passages for example in group}) == 1
            seen |= {example.task for example in group}
    assert seen == {"answer:drop", "answer:boolq", "question", "cloze", "completion", "infilling", "repetition"}


def test_steps_hold_examples_of_similar_length():
    plan = ExamplePlan(passages(), recipe())

    def spread(groups):
        lengths = [len(example.question) + len(example.answer) for group in groups for example in group]
        return max(lengths) - min(lengths)

    steps = [plan.step(number) for number in range(BUCKET_STEPS)]
    mixed = [[step[0] for step in steps[start : start + 4]] for start in range(0, BUCKET_STEPS, 4)]
    assert sum(map(spread, steps)) / len(steps) < sum(map(spread, mixed)) / len(mixed)


def test_distractors_are_other_passages_of_the_same_forward_pass():
    plan = ExamplePlan(passages(), recipe(distractors=3))
    steps = [plan.step(number) for number in range(8)]
    examples = [example for step in steps for group in step for example in group]
    assert {len(example.passages) for example in examples} >= {1, 2, 3}
    assert all(
        len(set(example.passages)) == len(example.passages) and example.own in example.passages for example in examples
    )
    for step in steps:
        owned = {group[0].own for group in step}
        assert all(set(example.passages) <= owned for group in step for example in group)
    # the right passage has no fixed place
    assert len({example.passages.index(example.own) for example in examples}) > 2


def test_answers_without_a_question_are_refused():
    bare = [Passage(PASSAGE, "drop")]
    with pytest.raises(ValueError, match="drop, boolq.*weight 0"):
        ExamplePlan(bare, recipe())
    assert ExamplePlan(bare, recipe(tasks={"cloze": 1})).step(0)


def test_renamed_passages_are_told_of_the_same_way_everywhere():
    question = Question("Where was Ada Lovelace born?", "London", "coqa", (("Who met Babbage?", "Lovelace"),))
    counted = Question("How many notes are there?", "Twelve", "drop")
    passage = Passage(PASSAGE, "coqa", [question, counted])
    renamed = rename(passage, random.Random(0))
    assert not {"Lovelace", "London", "Babbage", "1815", "1833"} & set(renamed.text.replace(".", " ").split())
    assert "December" in renamed.text
    assert renamed.text.startswith("Ada ")
    (kept,) = renamed.questions
    assert kept.answer in renamed.text
    assert kept.answer != "London"
    assert kept.history[0][1] in kept.text
    assert kept.history[0][1] in renamed.text
    assert rename(passage, random.Random(0)) == renamed


def test_renamed_passages_come_behind_the_others():
    made = passages()
    more = with_renamed(made, 3, seed=0)
    assert more[: len(made)] == made
    assert len(more) == len(made) + 3
    with pytest.raises(ValueError, match="`data.renamed` is 13, and there are 12 passages"):
        with_renamed(made, 13, seed=0)


@given(st.text(alphabet="ab. -'é", min_size=1, max_size=60), st.data())
def test_answer_places_are_where_a_search_finds_them(passage, data):
    """Tokens of one character: what is found spells the answer, at every occurrence as a whole word, in any case."""
    start = data.draw(st.integers(0, len(passage) - 1))
    answer = passage[start : data.draw(st.integers(start + 1, len(passage)))]
    offsets = [(index, index + 1) for index in range(len(passage))]
    places = answer_places(answer.upper(), offsets[: len(answer)], passage, offsets)
    first = places[0]
    assert places == [[place + index for place in first] for index in range(len(answer))]
    for place in first:
        assert passage[place : place + len(answer)] == answer
    word = (start == 0 or not passage[start - 1].isalnum()) and not passage[start + len(answer) :][:1].isalnum()
    once = sum(passage.startswith(answer, index) for index in range(len(passage))) == 1
    assert (start in first) or not (word and once)


def test_answer_places_cover_tokens_that_are_cut_elsewhere():
    passage, answer = "In 1963 Rosemary left.", "Rosemary"
    offsets = [(0, 2), (2, 7), (7, 12), (12, 16), (16, 21), (21, 22)]
    assert answer_places(answer, [(0, 8)], passage, offsets) == [[2, 3]]
    assert answer_places(answer, [(0, 3), (3, 8)], passage, offsets) == [[2], [2, 3]]
    assert answer_places("Rose", [(0, 4)], passage, offsets) == [[]]
