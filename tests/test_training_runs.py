"""Whole runs on a tiny model: resume, kill -9, two processes, bad runs, export; losses against plain ones."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_xcllama import XCLlamaForCausalLM
from modeling_xcllama.checkpoints import load_checkpoint as load_checkpoint_folder
from training.build import build_model, load_processor
from training.card import write_card
from training.checkpoints import checkpoints, load_checkpoint
from training.examples import ExamplePlan
from training.export import export_model, quick_look
from training.least_squares import fit_key_value
from training.loop import DivergedError, Setup, make_accelerator, read_log, train
from training.objectives import Objective
from training.passages import read_passages
from training.prompts import Prompts
from training.recipe import Recipe, recipe_from_dict
from training.run import batches_of, load_run, make_collator, reads_stored_states, run_recipe
from training.stored_states import StoredStates, encode_in_memory, store_states

SCRIPT = Path(__file__).parent.parent / "scripts" / "train.py"
NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jo"]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one token that ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    """A random decoder of four layers with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, eos_token_id=256, pad_token_id=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    """Ten passages with a question each, in the row schema."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = []
    for index, name in enumerate(NAMES):
        text = f"{name} has a red boat and {index + 3} cats. They all live with {name} in a small town by the sea."
        row = {"sample_idx": str(index), "dataset": "drop", "titles_list": [""], "contexts_list": [text]}
        row |= {"useful_contexts": [0], "question": f"How many cats has {name}?", "history": []}
        rows.append(row | {"answer": str(index + 3), "answers": [str(index + 3)], "answerable": True})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_recipe(base_folder, rows_file, tmp_path, monkeypatch):
    """A function that makes recipes of twelve steps; states of passages go to a folder of the test."""
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))

    def make(**changes) -> Recipe:
        values = {
            "name": "tiny",
            "model": {"base": str(base_folder), "config": {"context_layer": 2, "cross_attention_layers": [1, 3]}},
            "data": {"sources": {str(rows_file): 1}, "tasks": {"answer": 2, "cloze": 1, "completion": 1}},
            "optimization": {"steps": 12, "passages_per_step": 4, "precision": "fp32", "learning_rate": 1e-2},
            "run": {"save_steps": 4, "log_steps": 1},
        }
        for section, value in changes.items():
            values[section] = values[section] | value if isinstance(value, dict) else value
        return recipe_from_dict(values)

    return make


def batch_and_objective(recipe: Recipe, training: bool = True):
    """The first batch of a recipe and its objective."""
    prompts = Prompts(load_processor(recipe))
    passages = read_passages(recipe.data, recipe.seed)
    texts, ids = [p.text for p in passages], [prompts.context_ids(p.text) for p in passages]
    model = build_model(recipe)
    states = encode_in_memory(model, ids) if recipe.method == "cross_attention" else None
    collator = make_collator(recipe, prompts, texts, ids, states, training)
    examples = [example for group in ExamplePlan(passages, recipe).step(0) for example in group]
    return collator(examples), Objective(model, recipe), examples, prompts, texts


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights of the newest checkpoint."""
    return load_file(checkpoints(folder)[-1] / "weights.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shared", [False, True], ids=["hidden", "condensed"])
@pytest.mark.parametrize("distractors", [0, 2])
def test_loss_is_that_of_the_public_model(make_recipe, shared, distractors):
    config = {"context_layer": 2, "cross_attention_layers": [1, 3], "cross_attention_share_key_value": shared}
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
    scores = fit_key_value(model, ids)
    # the block after layer 1 reads the very states that layer 2 starts from
    assert scores[1] > 0.99
    assert scores[1] >= scores[3] > 0
    shared = make_recipe(model={"config": {"cross_attention_share_key_value": True, "cross_attention_layers": [1, 3]}})
    with pytest.raises(ValueError, match="least_squares_passages.*set it to 0"):
        fit_key_value(build_model(shared), ids)


def test_question_loss_counts_the_question(make_recipe):
    batch, plain, *_ = batch_and_objective(make_recipe())
    _, weighted, *_ = batch_and_objective(make_recipe(optimization={"question_loss": 0.5}))
    ids, read = batch.input_ids, batch.question_mask
    logits = plain.model(input_ids=ids, attention_mask=batch.attention_mask, context_cache=plain.context(batch)).logits
    token_losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    expected = plain(batch).answer + 0.5 * token_losses[read[:, 1:]].sum()
    torch.testing.assert_close(weighted(batch).objective, expected, rtol=1e-4, atol=1e-4)


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


def test_distillation_adds_the_divergence_from_a_teacher_that_reads_its_prompt(make_recipe):
    recipe = make_recipe()
    batch, objective, *_ = batch_and_objective(recipe)
    assert batch.teacher_ids is None
    values = recipe.to_dict() | {"distillation": {"weight": 1.0, "adapter": None, "temperature": 2.0}}
    recipe = recipe_from_dict(values)
    batch, student, *_ = batch_and_objective(recipe)
    teacher = LlamaForCausalLM.from_pretrained(recipe.model.base).requires_grad_(False)
    distilled = Objective(student.model, recipe, teacher)
    losses = distilled(batch)
    # by hand: the teacher reads the passage in its prompt, the answers' positions are paired in order
    teacher_logits = teacher(input_ids=batch.teacher_ids, attention_mask=batch.teacher_attention_mask).logits[:, :-1]
    student_logits = student.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, context_cache=student.context(batch)
    ).logits[:, :-1]
    first = (teacher_logits[batch.teacher_answer_mask[:, 1:]] / 2).log_softmax(-1)
    second = (student_logits[batch.answer_mask[:, 1:]] / 2).log_softmax(-1)
    divergence = 4 * (first.exp() * (first - second)).sum()
    assert divergence > 0
    torch.testing.assert_close(losses.objective - losses.answer, divergence, rtol=1e-3, atol=1e-4)


def test_stored_states_are_computed_once(make_recipe, tmp_path):
    recipe = make_recipe()
    model = build_model(recipe)
    passages = [[5, 6, 7], [8, 9], [10]]
    states = store_states(model, passages, tmp_path)
    files = list(tmp_path.rglob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    again = store_states(model, passages, tmp_path)
    assert [file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")] == before
    assert isinstance(again, StoredStates)
    fresh = model.encode_context(torch.tensor([passages[1]])).states["hidden"]
    torch.testing.assert_close(states[1], fresh)
    assert torch.equal(states[1], again[1])


def test_training_lowers_the_loss_and_resume_repeats_it(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe()
    run_recipe(recipe, tmp_path / "whole")
    losses = [line["loss"] for line in read_log(tmp_path / "whole" / "log.jsonl")]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    import training.loop as loop

    update, calls = loop._update, []

    def stop(step, *arguments):
        calls.append(step)
        if step == 9 and len(calls) == 10:
            raise KeyboardInterrupt
        return update(step, *arguments)

    monkeypatch.setattr(loop, "_update", stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "cut")
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["checkpoint-00000004", "checkpoint-00000008"]
    run_recipe(recipe, tmp_path / "cut", resume=True)
    assert calls[10] == 8
    assert equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))
    assert [line["loss"] for line in read_log(tmp_path / "cut" / "log.jsonl")] == losses


def run_script(recipe: Recipe, folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command line of a run in another process, with its recipe written to a file."""
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    return [
        *(launcher or (sys.executable,)),
        str(SCRIPT),
        "--recipe",
        str(path),
        "--run-folder",
        str(folder),
        *arguments,
    ]


def test_kill_and_resume_give_the_same_weights(make_recipe, tmp_path):
    recipe = make_recipe(optimization={"steps": 80}, run={"save_steps": 2, "log_steps": 50})
    folder = tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(run_script(recipe, folder), env=environment, cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not checkpoints(folder):
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    reached = json.loads((checkpoints(folder)[-1] / "state.json").read_text())["step"]
    assert 0 < reached < 80
    run_recipe(recipe, folder, resume=True)
    run_recipe(recipe, tmp_path / "whole")
    assert equal(weights_of(folder), weights_of(tmp_path / "whole"))


def test_two_processes_give_the_losses_of_one(make_recipe, tmp_path):
    recipe = make_recipe(optimization={"steps": 5})
    launch = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    )
    launch += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = run_script(recipe, tmp_path / "two", launcher=launch)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    run_recipe(recipe, tmp_path / "one")
    one, two = (list(read_log(tmp_path / name / "log.jsonl")) for name in ("one", "two"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["target_tokens"] for line in two] == [line["target_tokens"] for line in one]
    for name, weight in weights_of(tmp_path / "one").items():
        torch.testing.assert_close(weights_of(tmp_path / "two")[name], weight, rtol=1e-3, atol=1e-4)


def test_accumulation_gives_the_losses_of_one_batch(make_recipe, tmp_path):
    run_recipe(make_recipe(optimization={"steps": 4}), tmp_path / "one")
    run_recipe(make_recipe(optimization={"steps": 4, "accumulate": 4}), tmp_path / "four")
    one, four = ([line["loss"] for line in read_log(tmp_path / name / "log.jsonl")] for name in ("one", "four"))
    assert four == pytest.approx(one, rel=1e-5)


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(make_recipe, tmp_path):
    recipe = make_recipe()
    batch, objective, examples, prompts, texts = batch_and_objective(recipe)
    accelerator = make_accelerator(recipe, tmp_path)
    plan = ExamplePlan(read_passages(recipe.data, recipe.seed), recipe)
    ids = [prompts.context_ids(text) for text in texts]
    collator = make_collator(recipe, prompts, texts, ids, encode_in_memory(objective.model, ids))
    batches = batches_of(plan, collator, accelerator, recipe)

    def poisoned(step: int):
        found = batches(step)
        if step == 9:
            found[0].context_states.fill_(float("nan"))
        return found

    with pytest.raises(DivergedError, match=r"step 10 is nan.*Examples: 0:0:\d+:0") as error:
        train(recipe, tmp_path / "run", Setup(objective, poisoned), accelerator)
    assert all(key in str(error.value) for key in batches(9)[0].keys)
    last = checkpoints(tmp_path / "run")[-1]
    assert last.name == "checkpoint-00000008"
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "run").values())


def test_runs_do_not_overwrite_each_other(make_recipe, tmp_path):
    recipe = make_recipe(optimization={"steps": 1})
    run_recipe(recipe, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="add --resume"):
        run_recipe(recipe, tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run of recipe 'tiny'.*Nothing was overwritten"):
        run_recipe(make_recipe(optimization={"steps": 1}, seed=1), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="no run to resume"):
        run_recipe(recipe, tmp_path / "elsewhere", resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_named(make_recipe, tmp_path):
    recipe = make_recipe(optimization={"steps": 1})
    model = run_recipe(recipe, tmp_path / "run")
    path = checkpoints(tmp_path / "run")[-1] / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="checkpoint-00000001 cannot be read.*remove it"):
        load_checkpoint(tmp_path / "run", Objective(model, recipe))


def test_a_model_with_nothing_to_train_is_refused(make_recipe, tmp_path):
    recipe = make_recipe()
    _, objective, *_ = batch_and_objective(recipe)
    objective.requires_grad_(False)
    with pytest.raises(ValueError, match="no weight to train"):
        train(recipe, tmp_path, Setup(objective, lambda step: []), make_accelerator(recipe, tmp_path))


def test_rows_without_their_columns_are_refused(make_recipe, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "Who?"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: `sample_idx` is missing.*schema"):
        read_passages(make_recipe(data={"sources": {str(path): 1}}).data, 0)
    with pytest.raises(ValueError, match="neither a source .* nor a JSON Lines file"):
        read_passages(make_recipe(data={"sources": {"nothing.jsonl": 1}}).data, 0)
    with pytest.raises(ValueError, match="'sciq' does not allow commercial use"):
        read_passages(make_recipe(data={"sources": {"sciq": 1}}).data, 0)


def test_processes_must_divide_a_step(make_recipe, tmp_path):
    with pytest.raises(ValueError, match=r"passages_per_step.*\(4\).*multiple.*1 x 3"):
        make_accelerator(make_recipe(optimization={"accumulate": 3}), tmp_path)


def test_script_reports_bad_input_in_one_line(make_recipe, tmp_path):
    command = run_script(make_recipe(), tmp_path / "run", "--resume")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "holds no run to resume" in done.stderr
    assert "Traceback" not in done.stderr


def test_export_holds_what_a_reader_needs(make_recipe, tmp_path):
    recipe = make_recipe(run={"evaluate_steps": 6, "evaluate_questions": 4, "log_steps": 2})
    model = run_recipe(recipe, tmp_path / "run")
    log = list(read_log(tmp_path / "run" / "log.jsonl"))
    assert [line["step"] for line in log if "right_context" in line] == [6, 12]
    figures = quick_look(recipe, model, tmp_path / "run", questions=4)
    assert figures["step"] == 12
    assert set(figures["held_out"]) >= {"right_context", "wrong_context", "answer_loss", "samples"}
    target = tmp_path / "out"
    unrounded = {name: weight.detach().clone() for name, weight in model.added_parameters()}
    export_model(recipe, model, tmp_path / "run", target)
    assert {path.name for path in target.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "cross_attention.safetensors",
        "curve.json",
        "curve.png",
        "recipe.yaml",
        "training.json",
    }
    write_card(recipe, target)
    assert "Not measured." in (target / "README.md").read_text()
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    write_card(recipe, target, tmp_path / "figures.json")
    card = (target / "README.md").read_text()
    assert f"{figures['held_out']['wrong_context']['f1']:.3f}" in card
    assert recipe.digest in card
    assert {tensor.dtype for tensor in load_file(target / "cross_attention.safetensors").values()} == {torch.bfloat16}
    assert recipe_from_dict(yaml.safe_load((target / "recipe.yaml").read_text())).digest == recipe.digest
    assert equal(dict(load_run(recipe, tmp_path / "run").added_parameters()), unrounded)
    fresh = build_model(recipe)
    fresh.load_cross_attention(target)
    for (name, old), (_, new) in zip(model.added_parameters(), fresh.added_parameters(), strict=True):
        torch.testing.assert_close(new, old.float(), msg=name)


@pytest.mark.slow
def test_the_smoke_recipe_runs_through(smollm2_folder, tmp_path):
    recipe = SCRIPT.parent.parent / "training" / "recipes" / "smoke.yaml"
    command = [sys.executable, str(SCRIPT), "--recipe", str(recipe), "--run-folder", str(tmp_path / "run")]
    command += ["--export", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    model, processor = load_checkpoint_folder(tmp_path / "out")
    cache = model.encode_context(**processor(contexts=["The boat is red."], return_tensors="pt"))
    assert (
        model.generate(
            **processor(text="What colour is it?", return_tensors="pt"), context_cache=cache, max_new_tokens=4
        ).shape[0]
        == 1
    )
