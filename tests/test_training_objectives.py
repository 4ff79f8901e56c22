"""Losses and gradients against plain ones, for every method and layout; states and starts."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from training_support import base_folder, batch_and_objective, equal, make_recipe, rows_file, tiny_tokenizer
from transformers import BertConfig, BertModel, LlamaForCausalLM

from modeling_xcllama import XCLlamaForCausalLM
from modeling_xcllama.least_squares import fit_least_squares
from xcllama.training.build import build_model, load_processor
from xcllama.training.examples import ExamplePlan
from xcllama.training.objectives import Objective
from xcllama.training.passages import read_passages
from xcllama.training.prompts import Prompts
from xcllama.training.recipe import recipe_from_dict
from xcllama.training.run import make_collator, reads_stored_states, run_recipe
from xcllama.training.stored_states import store_states
from xcllama.training.teacher import Teacher, load_prompt_reader


@pytest.mark.parametrize("rope", [False, True], ids=["", "rope"])
@pytest.mark.parametrize("shared", [False, True], ids=["hidden", "condensed"])
@pytest.mark.parametrize("distractors", [0, 2])
def test_loss_is_that_of_the_public_model(make_recipe, shared, distractors, rope):
    config = {"context_layer": 2, "cross_attention_layers": [1, 3], "cross_attention_share_key_value": shared}
    config["cross_attention_rope"] = rope
    recipe = make_recipe(
        model={"config": config}, data={"distractors": distractors}, optimization={"context_dropout": 0}
    )
    batch, objective, examples, prompts, texts = batch_and_objective(recipe)
    losses = objective(batch)
    model: XCLlamaForCausalLM = objective.model
    total = 0.0
    for example in examples:
        prompt, _ = prompts.prompt_ids(example.question)
        ids = torch.tensor([prompt + prompts.answer_ids(example.answer)])
        contexts = prompts.processor(contexts=[texts[i] for i in example.passages], return_tensors="pt")
        cache = model.encode_context(**contexts)
        cache = cache.join([range(len(example.passages))])
        logits = model(input_ids=ids, context_cache=cache).logits[0, len(prompt) - 1 : -1]
        total += functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
    assert losses.answer.item() == pytest.approx(total, rel=1e-4)
    assert batch.num_targets == sum(len(prompts.answer_ids(example.answer)) for example in examples)


def test_gradients_reach_every_added_weight_and_no_other(make_recipe):
    batch, objective, *_ = batch_and_objective(make_recipe())
    objective(batch).objective.backward()
    for name, weight in objective.model.named_parameters():
        added = "cross_attention_blocks" in name or "context_projections" in name
        assert (weight.grad is not None and bool(weight.grad.abs().sum() > 0)) == added, name


def test_a_trained_encoder_learns_in_its_layers_only(make_recipe, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=257, max_position_embeddings=256, **sizes)).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    model = {"encoder": str(tmp_path / "encoder"), "train_encoder": True, "config": {"cross_attention_layers": [1, 3]}}
    values = make_recipe(optimization={"context_dropout": 0}).to_dict()
    recipe = recipe_from_dict(values | {"model": values["model"] | model})
    assert not reads_stored_states(recipe)
    prompts, passages = Prompts(load_processor(recipe)), read_passages(recipe.data, recipe.seed)
    ids = [prompts.context_ids(passage.text) for passage in passages]
    objective = Objective(build_model(recipe), recipe).eval()
    collator = make_collator(recipe, prompts, [passage.text for passage in passages], ids, None)
    examples = [example for group in ExamplePlan(passages, recipe).step(0) for example in group]
    batch = collator(examples)
    losses = objective(batch)
    losses.objective.backward()
    for name, weight in objective.model.model.encoder.named_parameters():
        assert (weight.grad is not None) == ("embedding" not in name), name
    contexts = prompts.processor(contexts=[passages[e.passages[0]].text for e in examples], return_tensors="pt")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logits = objective.model(**inputs, context_cache=objective.model.encode_context(**contexts)).logits[:, :-1]
    answer = batch.answer_mask[:, 1:]
    expected = functional.cross_entropy(logits[answer], batch.input_ids[:, 1:][answer], reduction="sum")
    torch.testing.assert_close(losses.answer, expected, rtol=1e-4, atol=1e-4)
    before = objective.model.model.encoder.state_dict()
    trained = run_recipe(recipe, tmp_path / "run").model.encoder.state_dict()
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    assert changed
    assert all(name.startswith("encoder.layer") for name in changed)


def test_least_squares_reproduces_the_keys_of_the_layer_that_follows(make_recipe):
    recipe = make_recipe()
    prompts, passages = Prompts(load_processor(recipe)), read_passages(recipe.data, recipe.seed)
    model = build_model(recipe)
    ids = [prompts.context_ids(passage.text) for passage in passages]
    scores = fit_least_squares(model, ids)
    # the block after layer 1 reads the very states that layer 2 starts from
    assert scores[1] > 0.99
    assert scores[1] >= scores[3] > 0


def test_gradient_checkpointing_changes_no_gradient(make_recipe, monkeypatch):
    batch, plain, *_ = batch_and_objective(make_recipe())
    _, saving, *_ = batch_and_objective(make_recipe(optimization={"gradient_checkpointing": True}))
    calls = []
    query = saving.model.model.cross_attention_blocks[0].q_proj
    query.register_forward_hook(lambda *_: calls.append(1))
    for objective in (plain, saving):
        objective.train()
        objective(batch).objective.backward()
    # once forward, once more for the gradient
    assert len(calls) == 2
    for (name, first), (_, second) in zip(
        plain.model.added_parameters(), saving.model.added_parameters(), strict=True
    ):
        torch.testing.assert_close(first.grad, second.grad, msg=name)


def test_question_loss_counts_the_question(make_recipe):
    batch, plain, *_ = batch_and_objective(make_recipe())
    _, weighted, *_ = batch_and_objective(make_recipe(optimization={"question_loss": 0.5}))
    ids, read = batch.input_ids, batch.question_mask
    logits = plain.model(input_ids=ids, attention_mask=batch.attention_mask, context_cache=plain.context(batch)).logits
    token_losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    expected = plain(batch).answer + 0.5 * token_losses[read[:, 1:]].sum()
    torch.testing.assert_close(weighted(batch).objective, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope", [False, True], ids=["", "rope"])
@pytest.mark.parametrize("shared", [False, True], ids=["hidden", "condensed"])
@pytest.mark.parametrize("distractors", [0, 2])
def test_span_loss_is_the_attention_that_misses_the_answer(make_recipe, shared, distractors, rope):
    config = {"context_layer": 2, "cross_attention_layers": [1, 3], "cross_attention_share_key_value": shared}
    config |= {"cross_attention_rope": rope, "cross_attn_implementation": "eager"}
    changes = {"span_loss": 0.5, "span_layers": [3], "context_dropout": 0.2}
    recipe = make_recipe(model={"config": config}, data={"distractors": distractors}, optimization=changes)
    batch, objective, *_ = batch_and_objective(recipe)
    ids, cache = batch.input_ids, objective.context(batch)
    output = objective.model(
        input_ids=ids, attention_mask=batch.attention_mask, context_cache=cache, output_attentions=True
    )
    missed = 0.0
    assert len(batch.span_positions) > 1
    for (row, position), mask in zip(batch.span_positions.tolist(), batch.span_mask, strict=True):
        context = torch.cat([batch.context_ids[batch.offsets[i] : batch.offsets[i + 1]] for i in batch.rows[row]])
        # the tokens to attend to are the answer's next token, wherever the answer stands
        assert set(context[mask[: len(context)]].tolist()) == {ids[row, position + 1].item()}
        assert not mask[len(context) :].any()
        weights = output.cross_attentions[1][row, :, position, : len(context)]
        missed -= (weights[:, mask[: len(context)]].sum(-1).mean() / 0.5).clamp(max=1).log()
    losses = objective(batch)
    assert missed > 0
    torch.testing.assert_close(losses.objective, losses.answer + 0.5 * missed, rtol=1e-4, atol=1e-4)
    losses.objective.backward()
    assert objective.model.model.cross_attention_blocks[1].q_proj.weight.grad.abs().sum() > 0


def test_context_dropout_hides_tokens_but_never_the_first(make_recipe):
    whole, *_ = batch_and_objective(make_recipe(optimization={"context_dropout": 0}))
    half, *_ = batch_and_objective(make_recipe(optimization={"context_dropout": 0.5}))
    assert 0.3 < half.offsets[-1] / whole.offsets[-1] < 0.7
    for start, whole_start in zip(half.offsets[:-1], whole.offsets[:-1], strict=True):
        assert half.context_ids[start] == whole.context_ids[whole_start]
        assert torch.equal(half.context_states[start], whole.context_states[whole_start])


def test_prompt_baseline_reads_the_passage_and_closed_book_does_not(make_recipe):
    lora = {"model": {"config": {}, "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}}
    prompt, objective, examples, prompts, texts = batch_and_objective(make_recipe(method="lora_prompt", **lora))
    closed, *_ = batch_and_objective(make_recipe(method="lora_closed_book", **lora))
    text = prompts.tokenizer.decode(prompt.input_ids[0])
    assert texts[examples[0].passages[0]] in text
    assert texts[examples[0].passages[0]] not in prompts.tokenizer.decode(closed.input_ids[0])
    assert prompt.num_targets == closed.num_targets
    objective(prompt).objective.backward()
    assert {
        name.split(".lora")[0].rsplit(".", 1)[1] for name, w in objective.named_parameters() if w.requires_grad
    } == {
        "q_proj",
        "v_proj",
    }


def distilled(make_recipe, **distillation):
    """A batch, a joint student of a recipe with `distillation`, its teacher, and the recipe."""
    prefix = tiny_tokenizer()("<user>")["input_ids"]
    config = {"cross_attention_mode": "joint", "context_layer": 1, "context_prefix": prefix}
    values = make_recipe(model={"config": config, "init": "random"}).to_dict() | {"distillation": distillation}
    recipe = recipe_from_dict(values)
    batch, student, *_ = batch_and_objective(recipe)
    return batch, student, Teacher(load_prompt_reader(recipe, None), prefix), recipe


def test_a_teacher_reads_the_passage_in_its_prompt(make_recipe):
    batch, _, teacher, recipe = distilled(make_recipe, weight=1.0)
    read = teacher.hidden_states(batch.input_ids, batch.attention_mask, batch.passages(), batch.own)[-1]
    plain, start = LlamaForCausalLM.from_pretrained(recipe.model.base), len(teacher.prefix)
    for row, passage in enumerate(batch.own):
        own = batch.input_ids[row][batch.attention_mask[row].bool()]
        assert own[:start].tolist() == teacher.prefix
        prompt = torch.cat([own[:start], batch.passages()[passage], own[start:]])
        wanted = plain.model(prompt[None]).last_hidden_state[0, start - len(own) :]
        torch.testing.assert_close(read[row, start : len(own)], wanted, atol=1e-4, rtol=1e-4)


def test_distillation_adds_divergence_and_distance_from_the_teacher(make_recipe):
    section = {"weight": 1.0, "temperature": 2.0, "hidden_weight": 0.5, "hidden_layers": [1, 2]}
    batch, student, teacher, recipe = distilled(make_recipe, **section)
    losses = Objective(student.model, recipe, teacher).train()(batch)
    wanted = teacher.hidden_states(batch.input_ids, batch.attention_mask, batch.passages(), batch.own)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    outputs = student.model(**inputs, context_cache=student.context(batch), output_hidden_states=True)
    answer = batch.answer_mask[:, 1:]
    first = (student.model.lm_head(wanted[-1])[:, :-1][answer] / 2).log_softmax(-1)
    second = (outputs.logits[:, :-1][answer] / 2).log_softmax(-1)
    expected = 4 * (first.exp() * (first - second)).sum()
    counted = batch.attention_mask.bool() & (torch.arange(batch.input_ids.shape[1]) >= len(teacher.prefix))
    for layer in (1, 2):
        near, far = outputs.hidden_states[layer][counted], wanted[layer][counted]
        expected = expected + 0.25 * ((near - far).square().sum(-1) / far.square().sum(-1)).sum()
    torch.testing.assert_close(losses.objective - losses.answer, expected, rtol=1e-3, atol=1e-4)
    # held-out losses need no teacher
    held_out = Objective(student.model, recipe, teacher).eval()(batch)
    torch.testing.assert_close(held_out.objective, held_out.answer)


def test_stored_states_are_computed_once(make_recipe, tmp_path):
    recipe = make_recipe()
    model = build_model(recipe)
    passages = [[5, 6, 7], [8, 9], [10]]
    states = store_states(model, passages, tmp_path)
    files = list(tmp_path.rglob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    again = store_states(model, passages, tmp_path)
    assert [file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")] == before
    assert len(again) == 3
    fresh = model.encode_context(torch.tensor([passages[1]])).states["hidden"]
    torch.testing.assert_close(states[1], fresh)
    assert torch.equal(states[1], again[1])
