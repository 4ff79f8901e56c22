"""Whole runs on a tiny model: resume, kill -9, two processes, bad runs, export."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_support import base_folder, batch_and_objective, equal, make_recipe, rows_file, sharp_folder, weights_of
from transformers import LlamaForCausalLM

from modeling_xcllama.fingerprint import weights_digest
from xcllama.models import load_model
from xcllama.provenance import write_result
from xcllama.publishing.model_card import readme
from xcllama.training.build import build_model
from xcllama.training.checkpoints import checkpoints, load_checkpoint
from xcllama.training.examples import ExamplePlan
from xcllama.training.export import export_model, training_figures
from xcllama.training.loop import DivergedError, Setup, make_accelerator, read_log, train
from xcllama.training.objectives import Objective
from xcllama.training.passages import read_passages
from xcllama.training.recipe import Recipe, recipe_from_dict
from xcllama.training.run import batches_of, load_run, make_collator, run_recipe
from xcllama.training.stored_states import encode_in_memory


def test_training_lowers_the_loss_and_resume_repeats_it(make_recipe, sharp_folder, tmp_path, monkeypatch):
    recipe = make_recipe(model={"base": str(sharp_folder)}, optimization={"learning_rate": 3e-2})
    batch, untrained, *_ = batch_and_objective(recipe)
    trained = Objective(run_recipe(recipe, tmp_path / "whole"), recipe)
    with torch.no_grad():
        before, after = (float(objective(batch).answer) for objective in (untrained, trained))
    assert after < 0.8 * before, (before, after)
    losses = [line["loss"] for line in read_log(tmp_path / "whole" / "log.jsonl")]
    assert len(losses) == 12
    assert not [
        name for name in weights_of(tmp_path / "whole") if "cross_attention" not in name and "context" not in name
    ]
    import xcllama.training.loop as loop

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


def test_a_stage_starts_where_the_one_before_it_stopped(make_recipe, tmp_path):
    first = make_recipe(optimization={"steps": 12}, run={"stop_step": 6})
    run_recipe(first, tmp_path / "first")
    assert checkpoints(tmp_path / "first")[-1].name == "checkpoint-00000006"
    values = make_recipe(optimization={"steps": 1, "learning_rate": 1e-9}).to_dict()
    values["model"]["start_from"] = str(tmp_path / "first")
    model = run_recipe(recipe_from_dict(values), tmp_path / "second")
    before = weights_of(tmp_path / "first")
    for name, weight in model.added_parameters():
        torch.testing.assert_close(weight.detach(), before[f"model.{name}"], rtol=0, atol=1e-6)
    values["model"]["start_from"] = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="start_from.*nowhere.*no checkpoint"):
        run_recipe(recipe_from_dict(values), tmp_path / "third")


def run_command(recipe: Recipe, folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command line of a run in another process, with its recipe written to a file."""
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    command = ("-m", "xcllama", "train", str(path), "--run-folder", str(folder))
    return [*(launcher or (sys.executable,)), *command, *arguments]


def test_kill_and_resume_give_the_same_weights(make_recipe, tmp_path):
    recipe = make_recipe(optimization={"steps": 80}, run={"save_steps": 2, "log_steps": 50})
    folder = tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(run_command(recipe, folder), env=environment, cwd=tmp_path, stderr=subprocess.PIPE)
    while not checkpoints(folder):
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
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
    command = run_command(recipe, tmp_path / "two", launcher=launch)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    run_recipe(recipe, tmp_path / "one")
    one, two = (list(read_log(tmp_path / name / "log.jsonl")) for name in ("one", "two"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["target_tokens"] for line in two] == [line["target_tokens"] for line in one]
    for name, weight in weights_of(tmp_path / "one").items():
        torch.testing.assert_close(weights_of(tmp_path / "two")[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharded_processes_give_the_losses_of_one_and_resume(make_recipe, tmp_path, precision):
    recipe = make_recipe(optimization={"steps": 6, "precision": precision}, run={"save_steps": 3})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    # `accelerate launch` refuses --cpu beside --use_fsdp; these are the variables that it would set
    environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    environment |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    environment |= {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    for arguments in ((), ("--resume",)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launch = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port)
        command = run_command(recipe, tmp_path / "two", *arguments, launcher=launch)
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        if not arguments:
            shutil.rmtree(tmp_path / "two" / "checkpoint-00000006")
    run_recipe(recipe, tmp_path / "one")
    one, two = ([line["loss"] for line in read_log(tmp_path / name / "log.jsonl")] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5 if precision == "fp32" else 1e-2)
    for name, weight in weights_of(tmp_path / "one").items():
        tolerance = 1e-4 if precision == "fp32" else 3e-2
        torch.testing.assert_close(weights_of(tmp_path / "two")[name], weight, rtol=tolerance, atol=tolerance)


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
            objective.model.model.context_projections[0].k_proj.weight.data.fill_(float("nan"))
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


def test_the_command_reports_bad_input_in_one_line(make_recipe, tmp_path):
    command = run_command(make_recipe(), tmp_path / "run", "--resume")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "holds no run to resume" in done.stderr
    assert "Traceback" not in done.stderr


def assert_threshold_belongs_to_weights(recipe: Recipe, model, run_folder: Path, target: Path) -> None:
    """Exported again, the same weights keep their `answer_threshold`, others lose it."""
    config = target / "config.json"
    before = json.loads(config.read_text())
    config.write_text(json.dumps(before | {"answer_threshold": 0.25}))
    export_model(recipe, model, run_folder, target)
    assert json.loads(config.read_text()) == before | {"answer_threshold": 0.25}
    (name, weight), *_ = model.added_parameters()
    kept = weight.detach().clone()
    weight.data.mul_(2)
    export_model(recipe, model, run_folder, target)
    assert json.loads(config.read_text()).get("answer_threshold") is None, name
    weight.data.copy_(kept)
    export_model(recipe, model, run_folder, target)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_export_holds_what_a_reader_needs(make_recipe, precision, tmp_path):
    run = {"evaluate_steps": 6, "evaluate_questions": 4, "log_steps": 2}
    recipe = make_recipe(run=run, optimization={"precision": precision})
    model = run_recipe(recipe, tmp_path / "run")
    log = list(read_log(tmp_path / "run" / "log.jsonl"))
    assert [line["step"] for line in log if "right_context" in line] == [6, 12]
    figures = training_figures(recipe, model, tmp_path / "run", questions=4)
    assert figures["step"] == 12
    assert figures["held_out"]["questions"] == 4
    assert set(figures["held_out"]["answer_loss"]) == {"right_context", "wrong_context"}
    target = tmp_path / "out"
    unrounded = {name: weight.detach().clone() for name, weight in model.added_parameters()}
    export_model(recipe, model, tmp_path / "run", target)
    # `xcllama train` measures what it exported
    assert training_figures(recipe, model, tmp_path / "run", questions=4)["step"] == 12
    assert {path.name for path in target.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "cross_attention.safetensors",
        "curve.json",
        "curve.png",
        "recipe.yaml",
        "training.json",
        # names the classes for Auto classes
        "xcllama_classes.py",
    }
    assert "Held-out" not in readme(target, tmp_path)
    write_result(tmp_path / f"training_{recipe.name}.json", figures, [], recipe.seed)
    card = readme(target, tmp_path)
    assert "license_name: terms-of-the-base-model" in card
    assert f"{figures['held_out']['answer_loss']['wrong_context']:.3f}" in card
    assert model.base_digest() in card
    assert {tensor.dtype for tensor in load_file(target / "cross_attention.safetensors").values()} == {torch.bfloat16}
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert_threshold_belongs_to_weights(recipe, model, tmp_path / "run", target)
    assert recipe_from_dict(yaml.safe_load((target / "recipe.yaml").read_text())).digest == recipe.digest
    assert equal(dict(load_run(recipe, tmp_path / "run").added_parameters()), unrounded)
    fresh = build_model(recipe)
    fresh.load_cross_attention(target)
    for (name, old), (_, new) in zip(model.added_parameters(), fresh.added_parameters(), strict=True):
        torch.testing.assert_close(new, old.float(), msg=name)


def test_a_start_keeps_its_share_of_the_weights(make_recipe, tmp_path):
    """The exported weights are the average; the run's own checkpoint, from which it resumes, is not averaged."""
    run_recipe(make_recipe(optimization={"steps": 2}), tmp_path / "first")
    later = {"model": {"start_from": str(tmp_path / "first")}, "name": "later"}
    averaged = make_recipe(optimization={"steps": 3, "start_share": 0.25}, **later)
    found = dict(run_recipe(averaged, tmp_path / "second").added_parameters())
    trained = load_file(checkpoints(tmp_path / "second")[-1] / "weights.safetensors")
    started = load_file(checkpoints(tmp_path / "first")[-1] / "weights.safetensors")
    for name, weight in trained.items():
        torch.testing.assert_close(
            found[name.removeprefix("model.")], 0.25 * started[name] + 0.75 * weight, msg=name, check_device=False
        )
    assert equal(dict(load_run(averaged, tmp_path / "second").added_parameters()), found)
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(ValueError, match="has no checkpoint for `start_share`"):
        load_run(averaged, tmp_path / "second")


def test_an_exported_adapter_names_its_base(make_recipe, base_folder, tmp_path):
    recipe = make_recipe(method="lora_prompt", optimization={"steps": 1}, run={"base_id": "org/base"})
    export_model(recipe, run_recipe(recipe, tmp_path / "run"), tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    digest = json.loads((tmp_path / "out" / "training.json").read_text())["base_digest"]
    base = LlamaForCausalLM.from_pretrained(base_folder)
    assert digest == weights_digest(base.named_parameters(), sampled=True)
    card = readme(tmp_path / "out", tmp_path)
    assert "base_model_relation: adapter" in card
    assert f"`{digest}`" in card


@pytest.mark.slow
def test_the_smoke_recipe_runs_through(smollm2_folder, tmp_path):
    command = [sys.executable, "-m", "xcllama", "train", "smoke", "--run-folder", str(tmp_path / "run")]
    command += ["--export", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    model, processor = load_model(tmp_path / "out")
    cache = model.encode_context(**processor(contexts=["The boat is red."], return_tensors="pt"))
    assert (
        model.generate(
            **processor(text="What colour is it?", return_tensors="pt"), context_cache=cache, max_new_tokens=4
        ).shape[0]
        == 1
    )
