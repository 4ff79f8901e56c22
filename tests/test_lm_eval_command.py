"""The command: tasks from YAML to results on disk, in every mode, and one clear line for whatever goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from evaluation_support import (
    FIXTURES,
    TEMPLATE,
    checkpoint,
    metadata,
    model_arguments,
    results,
    samples,
    word_tokenizer,
)

from dataset_builders import FEATURES, SOURCES, make_row, read_source
from dataset_builders.wheels import cache_folder
from modeling_xcllama import XCLlamaProcessor
from xcllama.evaluation import command, documents
from xcllama.evaluation.documents import load_documents
from xcllama.evaluation.task import ContextTask
from xcllama.store import ContextStore

SMOLLM2 = cache_folder() / "models" / "SmolLM2-135M-Instruct"
MODES = ("cross", "cross_shuffled", "prompt", "prompt_kv", "none")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process: (exit code, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        # what the call before wrote
        capsys.readouterr()
        code = command.main(list(arguments))
        captured = capsys.readouterr()
        # shown by pytest when the test fails
        sys.stderr.write(captured.err)
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_writes_quality_and_cost(run, checkpoint, tmp_path, mode):
    arguments = model_arguments(checkpoint, mode)
    data = metadata(squad_v2="squad_v2.json", msmarco="msmarco.json")
    code, out, _ = run(
        *arguments, "--tasks", "xc_squad_v2,xc_msmarco", "--metadata", data, "--batch_size", "2",
        "--output_path", str(tmp_path / "out"), "--log_samples", "--apply_chat_template",
    )  # fmt: skip
    assert code == 0
    assert "xc_msmarco" in out
    found = results(tmp_path / "out")
    assert set(found["results"]) == {"xc_squad_v2", "xc_msmarco"}
    assert found["config"]["context_mode"] == mode
    assert found["config"]["provenance"]["code"]["digest"]
    figures = found["results"]["xc_squad_v2"]
    for metric in ("exact_match", "f1", "answer_recall", "rouge_l", "k_precision", "no_answer_accuracy"):
        assert 0 <= figures[f"{metric},none"] <= 1
        assert figures[f"{metric}_stderr,none"] >= 0
    for sample in samples(tmp_path / "out", "xc_squad_v2"):
        assert sample["time_to_first_token"] > 0
        assert sample["generated_tokens"] >= 1
        assert (sample["context_tokens"] > 0) == (mode != "none")
        assert (sample["cache_bytes"] > 0) == (mode in ("cross", "cross_shuffled", "prompt_kv"))


def test_a_second_run_with_the_folder_encodes_nothing(run, checkpoint, tmp_path):
    figures = []
    for number in (1, 2):
        arguments = model_arguments(checkpoint, context_cache_dir=tmp_path / "contexts")
        code, *_ = run(*arguments, "--tasks", "xc_squad_v2", "--metadata", metadata(squad_v2="squad_v2.json"),
                       "--output_path", str(tmp_path / f"out{number}"))  # fmt: skip
        assert code == 0
        figures.append(results(tmp_path / f"out{number}"))
    first, second = (found["config"] for found in figures)
    assert first["contexts_encoded"] == first["contexts"] > 0
    assert second["contexts_encoded"] == 0
    assert second["contexts_from_folder"] == first["contexts"]
    assert figures[0]["results"]["xc_squad_v2"]["f1,none"] == figures[1]["results"]["xc_squad_v2"]["f1,none"]


def test_finished_tasks_are_kept_when_another_fails(run, checkpoint, tmp_path):
    data = json.loads(metadata(squad_v2="squad_v2.json"))
    data["paths"]["msmarco"] = str(tmp_path / "absent.json")
    code, _, err = run(*model_arguments(checkpoint), "--tasks", "xc_msmarco,xc_squad_v2",
                       "--metadata", json.dumps(data), "--output_path", str(tmp_path / "out"))  # fmt: skip
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("Error:")]
    assert "xc_msmarco" in line
    assert "python scripts/build_dataset.py --source msmarco" in line
    assert set(results(tmp_path / "out")["results"]) == {"xc_squad_v2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "xc_nothing"], "task 'xc_nothing' is unknown; this project's are xc_biomedical, xc_boolq"),
        (
            ["--tasks", "xc_squad_v2", "--use_cache", "x"],
            "`--use_cache` is refused: it keys answers by the prompt alone",
        ),
        (["--tasks", "xc_squad_v2", "--num_fewshot", "2"], "`--num_fewshot` must be 0"),
        (["--tasks", "xc_squad_v2", "--log_samples"], "Specify --output_path"),
    ],
    ids=["task", "use_cache", "num_fewshot", "log_samples"],
)
def test_bad_arguments_end_in_one_line(run, checkpoint, monkeypatch, arguments, message):
    # lm-eval's own thousands of tasks take long to index
    monkeypatch.setattr(command, "INCLUDE_DEFAULTS", (False,))
    code, out, err = run(*model_arguments(checkpoint), *arguments)
    assert code == 1
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("Error:")]
    assert message in line


def test_bad_models_end_in_one_line(run, checkpoint, tmp_path):
    for arguments, message in [
        (model_arguments(checkpoint, "crosswise"), "`context_mode` must be one of"),
        (model_arguments(str(tmp_path / "nowhere")), "`pretrained` names no folder"),
        (model_arguments(str(tmp_path / "base")), "needs a model with cross-attention"),
    ]:
        code, _, err = run(*arguments, "--tasks", "xc_squad_v2")
        assert code == 1
        assert message in [line for line in err.splitlines() if line.startswith("Error:")][-1]


BARE_TASK = """
task: bare
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 2}
metric_list: [{metric: exact_match}]
"""


def test_bad_documents_end_in_one_line(run, checkpoint, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"question": "Who is the", "answer": "Who"}\n')
    (tmp_path / "bare.yaml").write_text(BARE_TASK.replace("QUESTIONS", str(tmp_path / "questions.jsonl")))
    row = make_row("squad_v2", "1", "Why?", ["word " * 3000], ["so"])
    Dataset.from_list([row], features=FEATURES).to_parquet(tmp_path / "test-00000.parquet")
    data = {"paths": {"squad_v2": str(tmp_path)}, "split": "test", "bertscore_model": "none"}
    longer = "use context_mode=cross, add truncation=True to --model_args"
    for task, mode, options, message in [
        ("bare", "cross", {}, "has no contexts (field `contexts_list`)"),
        ("bare", "prompt", {}, "has no contexts (field `contexts_list`)"),
        ("bare", "none", {}, None),
        ("xc_squad_v2", "prompt", {}, longer),
        ("xc_squad_v2", "prompt_kv", {}, longer),
        ("xc_squad_v2", "prompt_kv", {"truncation": "True"}, None),
        # the decoder has 2,048 positions, the cache no such limit
        ("xc_squad_v2", "cross", {}, None),
    ]:
        code, _, err = run(*model_arguments(checkpoint, mode, **options), "--tasks", task,
                           "--include_path", str(tmp_path), "--metadata", json.dumps(data))  # fmt: skip
        lines = [line for line in err.splitlines() if line.startswith("Error:")]
        assert code == int(message is not None)
        assert len(lines) == code
        assert not code or (lines[0].startswith(f"Error: task {task}: ") and message in lines[0])


def test_a_cache_folder_of_another_model_ends_in_one_line(run, checkpoint, tmp_path):
    folder = tmp_path / "contexts"
    ContextStore(folder, fingerprint="another").close()
    code, out, err = run(*model_arguments(checkpoint, context_cache_dir=folder), "--tasks", "xc_squad_v2")
    assert code == 1
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("Error:")]
    assert "its fingerprint is another, the model's" in line


def test_sampling_depends_on_the_seed_only(run, checkpoint, tmp_path):
    answers = []
    for number, seed in enumerate(("7", "7", "8")):
        folder = tmp_path / str(number)
        code, *_ = run(*model_arguments(checkpoint), "--tasks", "xc_squad_v2", "--limit", "2", "--seed", seed,
                       "--gen_kwargs", "do_sample=True,temperature=1.0,top_k=0", "--output_path", str(folder),
                       "--metadata", metadata(squad_v2="squad_v2.json"), "--log_samples")  # fmt: skip
        assert code == 0
        assert results(folder)["config"]["torch_seed"] == int(seed)
        found = samples(folder, "xc_squad_v2")
        assert len(found) == 2
        answers.append([sample["resps"] for sample in found])
    assert answers[0] == answers[1] != answers[2]


def test_the_module_runs_from_anywhere(tmp_path):
    arguments = ["--model", "xcllama", "--model_args", "pretrained=x,context_mode=wrong", "--tasks", "xc_coqa"]
    done = subprocess.run(
        [sys.executable, "-m", "xcllama", "eval", "run", *arguments],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "`context_mode` must be one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_groups_and_tasks_fit_the_sources():
    configs = {}
    for path in command.TASKS.glob("xc_*.yaml"):
        # a loader that leaves functions alone
        text = path.read_text().replace("!function", "")
        configs[path.stem] = yaml.safe_load(text)
    groups = {name: config["task"] for name, config in configs.items() if "group" in config}
    assert set(groups) == {"xc_offline", "xc_paper"}
    for tasks in groups.values():
        for task in tasks:
            assert configs[task]["task"] == task
            assert configs[task]["dataset_kwargs"]["source"] in SOURCES
            assert configs[task]["metadata"]["version"] == 2.0


def test_documents_of_a_built_folder(tmp_path):
    rows = list(read_source("squad_v2", str(FIXTURES / "squad_v2.json"), "all"))
    others = list(read_source("msmarco", str(FIXTURES / "msmarco.json"), "all"))
    (tmp_path / "mix").mkdir()
    Dataset.from_list(rows + others, features=FEATURES).to_parquet(tmp_path / "mix" / "test-00000.parquet")
    paths = {"squad_v2": str(tmp_path)}
    found = load_documents("squad_v2", paths=paths)["test"].to_list()
    assert sorted(found, key=rows.index) == rows
    assert load_documents("squad_v2", paths=paths, max_documents=1)["test"].to_list() == rows[:1]
    with pytest.raises(ValueError, match="holds no train-.*build_dataset.py --source squad_v2"):
        load_documents("squad_v2", paths=paths, split="train")


def test_a_limit_takes_a_sample_that_is_always_the_same(monkeypatch):
    # as in a file: ten questions of each text in a row
    rows = [
        make_row("squad_v2", f"{text} {number}", "Why?", [f"Text {text}."], ["so"])
        for text in range(8)
        for number in range(10)
    ]
    monkeypatch.setattr(documents, "read_source", lambda *arguments: iter(rows))
    found = load_documents("squad_v2")["test"]
    assert sorted(found["sample_idx"]) == sorted(row["sample_idx"] for row in rows)
    assert len({texts[0] for texts in found["contexts_list"][:10]}) >= 5
    monkeypatch.setattr(documents, "read_source", lambda *arguments: iter(rows[::-1]))
    assert load_documents("squad_v2")["test"].to_list() == found.to_list()


def test_prompts_are_those_of_the_processor():
    history = [{"question": "Who?", "answer": "Ann."}, {"question": "Why?", "answer": "For fun."}]
    config = yaml.safe_load((command.TASKS / "xc_squad_v2.yaml").read_text())
    config = {
        "task": "t", "test_split": "test", "output_type": "generate_until", "doc_to_text": "question",
        "doc_to_target": "answers", "custom_dataset": lambda **_: command_documents(history), **config,
    }  # fmt: skip
    config.pop("include")
    task = ContextTask(config | {"dataset_kwargs": {}})
    tokenizer = word_tokenizer()
    for template in (TEMPLATE, None):
        tokenizer.chat_template = template
        expected = XCLlamaProcessor(tokenizer).prompts(["Where?"], [[("Who?", "Ann."), ("Why?", "For fun.")]])
        prompt = task.fewshot_context(
            task.task_docs[0], 0, apply_chat_template=template is not None, fewshot_as_multiturn=True,
            chat_template=lambda messages: tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True),
        )  # fmt: skip
        assert prompt == expected[0]


def command_documents(history):
    row = make_row("squad_v2", "1", "Where?", ["Ann was there."], ["there"])
    return {"test": Dataset.from_list([row | {"history": history}], features=FEATURES)}


@pytest.mark.slow
def test_smollm2_end_to_end(run, tmp_path):
    if not SMOLLM2.is_dir():
        pytest.skip("SmolLM2 is not here; `make models` fetches it")
    code, *_ = run(*model_arguments(str(SMOLLM2), "prompt"), "--tasks", "xc_offline", "--limit", "2",
                   "--apply_chat_template", "--output_path", str(tmp_path / "out"),
                   "--model_args", "truncation=True,max_length=1024")  # fmt: skip
    assert code == 0
    found = results(tmp_path / "out")["results"]
    assert len(found) == 7
    assert "bert_score,none" in found["xc_coqa"]
    assert 0 <= found["xc_boolq"]["acc,none"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["prompt", "prompt_kv"])
def test_smollm2_equals_hflm_with_the_contexts_in_its_prompt(mode):
    if not SMOLLM2.is_dir():
        pytest.skip("SmolLM2 is not here; `make models` fetches it")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from xcllama.evaluation.model import XCLlamaLM

    text = "The Kiel Canal joins the North Sea and the Baltic. It was opened in 1895."
    document = {"question": "When was it opened?", "contexts_list": [text]}
    options = {"device": "cpu", "dtype": "float32", "batch_size": 2}
    scores = []
    for model, shown in (
        (XCLlamaLM(str(SMOLLM2), mode, **options), "When was it opened?"),
        (HFLM(pretrained=str(SMOLLM2), **options), f"{text}\n\nWhen was it opened?"),
    ):
        prompt = model.apply_chat_template([{"role": "user", "content": shown}])
        answers = ["1895", "It was opened in 1895.", "never"]
        found = model.loglikelihood(
            [Instance("loglikelihood", document, (prompt, answer), 0, metadata=("task", 0, 1)) for answer in answers]
        )
        scores.append([value for value, _ in found])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_lm_evals_own_list_shows_our_tasks_offline():
    words = [sys.executable, "-m", "lm_eval", "ls", "tasks", "--include_path", str(command.TASKS)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(name in done.stdout for name in ("xc_offline", "xc_squad_sample", "xc_repliqa"))
