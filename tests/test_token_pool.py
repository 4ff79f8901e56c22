"""A pool of tokens gives the steps that a recipe draws from its passages; training on it keeps to a time."""

import math
from itertools import pairwise

import pytest
import torch
from training_support import base_folder, batch_and_objective, make_recipe, rows_file

from xcllama.gpu_check.tiny import tiny_base, tiny_pool, tiny_recipe
from xcllama.training import pooling, timed
from xcllama.training.build import build_model, load_processor
from xcllama.training.objectives import Objective
from xcllama.training.prompts import Prompts
from xcllama.training.stored_states import encode_in_memory
from xcllama.training.timed import train_for
from xcllama.training.token_pool import PoolBatches, TokenPool


@pytest.fixture
def pool(make_recipe, monkeypatch) -> TokenPool:
    held = [
        {"answerable": known, "contexts_list": [f"Text {n}."], "question": f"What is {n}?", "answers": [str(n)]}
        for n, known in enumerate([True, False, True, True])
    ]
    monkeypatch.setattr(pooling, "read_source", lambda source, split: iter(held))
    recipe = make_recipe(optimization={"context_dropout": 0.0})
    return pooling.make_pool(recipe, held_out=2, label_free_groups=8)


def test_the_file_holds_the_pool(pool, tmp_path):
    pool.save(tmp_path)
    loaded = TokenPool.load(tmp_path)
    for name in ("passages", "prompts", "answers", "held_passages", "held_prompts"):
        ours, theirs = getattr(pool, name), getattr(loaded, name)
        assert torch.equal(ours.values, theirs.values)
        assert ours.offsets == theirs.offsets
    assert torch.equal(loaded.group_own, pool.group_own)
    assert (loaded.held_answers, loaded.origin) == ([["0"], ["2"]], pool.origin)
    with pytest.raises(ValueError, match="holds no pool.safetensors"):
        TokenPool.load(tmp_path / "nowhere")


def test_tasks_are_drawn_as_often_as_the_recipe_says(pool):
    """Two of four parts are the sources' own questions, one each made of passages by two tasks."""
    kinds = pool.weights.tolist()
    assert sum(kinds) == pytest.approx(1)
    # ten passages have a question, and eight groups are made
    assert sum(kinds[:10]) == pytest.approx(0.5)
    assert len(kinds) == 18


def test_questions_that_read_another_passage_never_see_their_own(tmp_path):
    pool, recipe = tiny_pool(), tiny_recipe(tmp_path)
    batches = PoolBatches(pool, recipe, pool.passages.values[:, None])
    found = [batch for number in range(10) for batch in batches.step(number)]
    kinds = set()
    for batch in found:
        for key, own, read in zip(batch.keys, batch.own, batch.rows, strict=True):
            stranger = int(key) >= 22
            kinds.add(stranger)
            assert (own is None) == stranger
            texts = [batch.passages()[passage].tolist() for passage in read]
            assert len(texts) <= 2
            assert pool.passages[11 if stranger else int(key) // 2].tolist() in texts
            # distractors bring no answer back
            assert not stranger or pool.passages[0].tolist() not in texts
    assert kinds == {True, False}


def test_a_step_holds_what_a_collator_makes(pool, make_recipe):
    recipe = make_recipe(optimization={"context_dropout": 0.0}, data={"distractors": 1})
    _, objective, _, prompts, _ = batch_and_objective(recipe)
    passages = [pool.passages[index].tolist() for index in range(len(pool.passages))]
    stored = encode_in_memory(objective.model, passages)
    states = torch.cat([stored[index] for index in range(len(passages))])
    batches = PoolBatches(pool, recipe, states)
    (batch,) = batches.step(3)
    for row, index in enumerate(map(int, batch.keys)):
        ids = torch.cat([pool.prompts[index], pool.answers[index]])
        assert torch.equal(batch.input_ids[row, : len(ids)], ids)
        assert batch.attention_mask[row].sum() == len(ids)
        assert torch.equal(batch.input_ids[row][batch.answer_mask[row]], pool.answers[index])
        question = batch.input_ids[row][batch.question_mask[row]]
        assert prompts.tokenizer.decode(question) in prompts.tokenizer.decode(pool.prompts[index])
        assert batch.own[row] in batch.rows[row]
        assert len(batch.rows[row]) <= 2
    for passage, (start, end) in zip(batch.passages(), pairwise(batch.offsets), strict=True):
        found = passages.index(passage.tolist())
        assert torch.equal(batch.context_states[start:end], stored[found])
    again = PoolBatches(pool, recipe, states).step(3)[0]
    assert torch.equal(again.input_ids, batch.input_ids)
    assert again.rows == batch.rows
    halves = batches.step(3, parts=2)
    assert [len(half.own) for half in halves] != [len(batch.own)]
    assert sum(half.num_targets for half in halves) == batch.num_targets
    assert objective(batch).answer.isfinite()
    with pytest.raises(ValueError, match="context_dropout"):
        PoolBatches(pool, make_recipe(), states)


@pytest.fixture
def tiny_run(tmp_path):
    recipe = tiny_recipe(tiny_base(tmp_path / "base"))
    pool = tiny_pool()
    model = build_model(recipe)
    states = model.model.encode_packed([pool.passages[index] for index in range(len(pool.passages))])
    return recipe, Objective(model, recipe), PoolBatches(pool, recipe, states), tmp_path / "log.jsonl"


def test_training_keeps_to_its_time_and_to_a_request(tiny_run, monkeypatch):
    recipe, objective, batches, log = tiny_run
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(timed.time, "monotonic", lambda: float(next(clock)))
    before = [weight.detach().clone() for weight in objective.parameters() if weight.requires_grad]
    run = train_for(recipe, objective, batches, 60.0, log)
    assert (run.ended, run.parts) == ("time", 1)
    assert 2 <= run.steps <= 10
    assert run.seconds <= 66
    # a line every ten seconds of this clock, and the first step's
    assert len(run.curve) == len(log.read_text().splitlines()) >= 3
    assert run.curve[-1]["learning_rate"] < run.curve[1]["learning_rate"]
    assert any(not torch.equal(a, b) for a, b in zip(before, objective.parameters(), strict=False))
    assert train_for(recipe, objective, batches, 60.0, log, stopped=lambda: True).ended == "stopped"
    assert train_for(recipe, objective, batches, 600.0, log, max_steps=1).steps == 1


def test_gradients_that_are_not_finite_end_a_run_at_the_weights_before_them(tiny_run, monkeypatch):
    recipe, objective, batches, log = tiny_run
    weights = [weight for weight in objective.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    monkeypatch.setattr(timed, "MOST_SKIPPED", 2)
    monkeypatch.setattr(timed.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    run = train_for(recipe, objective, batches, 600.0, log)
    assert (run.ended, run.steps) == ("diverged", 2)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_a_step_that_does_not_fit_is_cut(tiny_run, monkeypatch):
    recipe, objective, batches, log = tiny_run
    forward, sizes = objective.forward, []

    def small(batch):
        sizes.append(len(batch.own))
        if len(batch.own) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch)

    monkeypatch.setattr(objective, "forward", small)
    run = train_for(recipe, objective, batches, 600.0, log, max_steps=1)
    assert (run.parts, run.steps) == (2, 1)
    assert sizes[0] == 8
    assert len(load_processor(recipe).tokenizer) > 256
    assert Prompts(load_processor(recipe)).pad_token_id is not None
