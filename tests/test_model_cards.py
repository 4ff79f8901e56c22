"""Cards: every section filled, every figure from its file, valid metadata; and what is refused."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResultEntry, ModelCard
from publishing_support import BASE, NUMBER, make_adapter, make_checkpoint, strange_numbers
from transformers import AutoProcessor, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from dataset_builders import SOURCES
from dataset_builders.card import render_card
from modeling_xcllama import XCLlamaConfig, XCLlamaForCausalLM
from modeling_xcllama.checkpoints import is_added_weights
from xcllama.models import load_model
from xcllama.publishing.assembling import (
    assemble_adapter,
    assemble_kernel,
    assemble_model,
    check_adapter,
    load_source,
)
from xcllama.publishing.checking import answer, require_equal
from xcllama.publishing.model_card import (
    CASES,
    DEFAULT,
    adapter_card,
    checkpoint_card,
    conversion_card,
    eval_results_yaml,
    evaluation_of,
    is_adapter,
    read_result,
    readme,
    token_costs,
)
from xcllama.publishing.publishing import Release
from xcllama.publishing.rendering import FOLDER, check_card, render

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
FOLDERS = sorted((ROOT / "checkpoints").iterdir())
CHECKPOINTS = [folder for folder in FOLDERS if is_added_weights(folder)]
ADAPTERS = [folder for folder in FOLDERS if is_adapter(folder)]


def card_of(folder: Path, results: Path = RESULTS) -> str:
    return checkpoint_card(folder, XCLlamaConfig.from_pretrained(folder), results, f"org/{folder.name}")


def untraced(card: str, folder: Path) -> set[str]:
    """Numbers of a card that are in none of the files it is filled from, nor in the words of its templates."""
    config = XCLlamaConfig.from_pretrained(folder)
    costs = token_costs(config)
    shares = [size / costs["key_value"] for size in (*costs["file"].values(), costs["projected"])]
    results = [read_result(RESULTS, name) for name in (f"eval_{folder.name}", "demo", "benchmark")]
    sources = [json.loads((folder / "config.json").read_text()), config.context_width, costs, shares, results]
    templates = (FOLDER / "model_card.md.jinja", *FOLDER.glob("_*.jinja"))
    return strange_numbers(card, [*sources, *training_sources(folder)], *templates)


def training_sources(folder: Path) -> list:
    """What the training section of every card is filled from."""
    trained, measured = (
        json.loads((folder / "training.json").read_text()),
        read_result(RESULTS, f"training_{folder.name}"),
    )
    terms = [SOURCES[name].licence + SOURCES[name].homepage for name in SOURCES]
    totals = [sum(stage["seconds"] for stage in trained["stages"])]
    totals += [] if measured is None else [sum(measured["parameters"].values())]
    return [trained, measured, yaml.safe_load((folder / "recipe.yaml").read_text()), terms, totals]


def test_there_is_a_checkpoint():
    assert CHECKPOINTS


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_every_figure_is_traced_and_every_section_filled(folder):
    card = card_of(folder)
    assert untraced(card, folder) == set()
    assert untraced(card.replace("## Limits", "## Limits\n0.98765 of all answers"), folder) == {"0.98765"}
    titles = set(re.findall(r"^## (.*)$", card, re.MULTILINE))
    assert titles >= {"Use", "What a context token costs", "Training", "Limits", "Citation"}
    assert ("Evaluation" in titles) == (read_result(RESULTS, f"eval_{folder.name}") is not None)
    # a results file of an earlier training is left out
    assert ("Held-out figures" in titles) == (read_result(RESULTS, f"training_{folder.name}") is not None)


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
def test_every_figure_of_an_adapter_is_traced(folder):
    card = adapter_card(folder, RESULTS, f"org/{folder.name}")
    sources = [json.loads((folder / "adapter_config.json").read_text()), read_result(RESULTS, f"eval_{DEFAULT}")]
    templates = (FOLDER / "adapter_card.md.jinja", *FOLDER.glob("_*.jinja"))
    assert strange_numbers(card, [*sources, *training_sources(folder)], *templates) == set()
    titles = set(re.findall(r"^## (.*)$", card, re.MULTILINE))
    assert titles >= {"Use", "Training", "Limits", "Citation"}


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_the_metadata_is_valid_and_complete(folder):
    data, trained = ModelCard(card_of(folder)).data, json.loads((folder / "training.json").read_text())
    assert (data.library_name, data.pipeline_tag, data.base_model_relation) == (
        "transformers",
        "text-generation",
        "finetune",
    )
    assert re.fullmatch("[0-9a-f]{64}", data.base_model_digest)
    assert set(data.datasets) == {SOURCES[name].hub_id for name in trained["sources"] if name in SOURCES} - {""}
    assert XCLlamaConfig.from_pretrained(folder).base_model_name_or_path in data.base_model


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_the_model_index_holds_the_published_models_own_figures(folder):
    """And `.eval_results` likewise, and nothing else."""
    data, evaluation = ModelCard(card_of(folder)).data, evaluation_of(folder, RESULTS)
    if evaluation is None:
        assert data.eval_results is None
        pytest.skip(f"results/eval_{folder.name}.json was measured with other weights, or not yet")
    own = [run for run in evaluation["runs"] if run["method"] == f"{folder.name} / cross / bfloat16"]
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    names = ("f1", "acc", "exact_match")
    expected = {
        (run["task"], name): run["quality"][name]["value"] for run in own for name in names if name in run["quality"]
    }
    assert found == expected
    entries = yaml.safe_load(eval_results_yaml(evaluation, folder.name)) or []
    assert {(entry["dataset"]["task_id"], entry["value"]) for entry in entries} <= {
        (task, value) for (task, _), value in expected.items()
    }
    assert len(entries) == len(own)
    for entry in entries:
        EvalResultEntry(entry["dataset"]["id"], entry["dataset"]["task_id"], entry["value"], date=entry["date"])


def test_a_changed_result_changes_the_card(tmp_path):
    folder = ROOT / "checkpoints" / DEFAULT
    shutil.copytree(RESULTS, tmp_path / "results")
    path = tmp_path / "results" / f"eval_{folder.name}.json"
    result = json.loads(path.read_text())
    run = next(run for run in result["runs"] if "f1" in run["quality"])
    run["quality"]["f1"]["value"] = 0.98765
    path.write_text(json.dumps(result))
    assert "| 0.988 |" in card_of(folder, tmp_path / "results")
    assert "## Evaluation" not in card_of(folder, tmp_path / "nothing measured")
    # nor does it show what other weights were measured at
    own = next(run for run in result["runs"] if run["model"] == folder.name)
    path.write_text(json.dumps(result).replace(own["added_digest"], "0" * 64))
    assert "## Evaluation" not in card_of(folder, tmp_path / "results")
    path = tmp_path / "results" / f"eval_{folder.name}.json"
    run["method"] = None
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="has an empty slot: a value is None or empty"):
        card_of(folder, tmp_path / "results")


def test_figures_of_another_training_are_not_shown(tmp_path):
    folder = ROOT / "checkpoints" / DEFAULT
    shutil.copytree(RESULTS, tmp_path / "results")
    path = tmp_path / "results" / f"training_{folder.name}.json"
    if not path.is_file():
        pytest.skip(f"results/{path.name} was not measured yet")
    measured = json.loads(path.read_text())
    measured["stages"] = json.loads((folder / "training.json").read_text())["stages"]
    path.write_text(json.dumps(measured))
    assert "## Held-out figures" in card_of(folder, tmp_path / "results")
    measured["stages"][-1]["step"] += 1
    path.write_text(json.dumps(measured))
    assert "## Held-out figures" not in card_of(folder, tmp_path / "results")


def test_the_benchmark_has_its_table(tmp_path):
    """The requests of scripts/benchmark.py, in the card of the checkpoint that it measures and in no other."""
    shutil.copytree(RESULTS, tmp_path / "results")
    spread = {"low": 0.1, "high": 0.9, "count": 5}
    row = {"first_token_seconds": spread | {"median": 0.4321}, "step_seconds": spread | {"median": 0.0567}}
    cases = {case: row | {"resident_bytes": 1234567} for case in (*CASES, "condensed 16-bit, memory")}
    benchmark = {"context_512": {"requests": cases}, "limits": {"threads": 2}}
    provenance = json.loads((RESULTS / f"eval_{DEFAULT}.json").read_text())["provenance"]
    provenance |= {"command": "python scripts/benchmark.py"}
    (tmp_path / "results" / "benchmark.json").write_text(json.dumps({"provenance": provenance} | benchmark))
    folder = ROOT / "checkpoints" / DEFAULT
    card = card_of(folder, tmp_path / "results")
    assert card.count("| 0.432 s | 0.057 s | 1,234,567 |") == len(CASES)
    assert "`python scripts/benchmark.py`, commit" in card
    other = shutil.copytree(folder, tmp_path / "another")
    assert "## Speed" not in card_of(other, tmp_path / "results")


def test_templates_hold_no_figures():
    """What is typed in a template is the method's name, never a measurement."""
    known = {"2404.15420", "2024", "95", "16", "0", "5", "256"}
    for path in FOLDER.glob("*.jinja"):
        words = re.sub(r"\{[{%].*?[%}]\}|```.*?```|F1", "", path.read_text(), flags=re.DOTALL)
        if path.name != "dataset_card.md.jinja":
            assert set(NUMBER.findall(words)) <= known, path


def test_non_commercial_data_are_said_in_the_licence(tmp_path):
    folder = shutil.copytree(ROOT / "checkpoints" / DEFAULT, tmp_path / DEFAULT)
    trained = json.loads((folder / "training.json").read_text())
    trained["sources"] = ["coqa", "sciq"]
    (folder / "training.json").write_text(json.dumps(trained))
    card = card_of(folder)
    header = check_card(card, "card")
    assert (header["license"], header["license_name"]) == ("other", "trained-on-non-commercial-data")
    assert "for non-commercial use (sciq)" in card
    (folder / "training.json").unlink()
    with pytest.raises(ValueError, match=r"has no training\.json, which fills its card"):
        card_of(folder)


@pytest.mark.parametrize(
    ("base", "name", "licence", "groups"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "xc-llama-2-7b", "llama2", 32),
        ("meta-llama/Meta-Llama-3-8B", "Llama-3-8B-xc", "llama3", 8),
    ],
    ids=["llama-2-7b", "llama-3-8b"],
)
def test_cards_of_conversions(base, name, licence, groups):
    fields = {"num_key_value_heads": groups, "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
    config = XCLlamaConfig(**fields, base_model_name_or_path=base, base_model_digest="0" * 64)
    card = conversion_card(name, config, f"org/{name}", "ServiceNow/xc-cache-checkpoint")
    header = check_card(card, "card")
    assert (header["license"], header["base_model"]) == (licence, [base])
    assert f"| bfloat16 | {2 * 4096:,} |" in card
    assert f"takes {2 * 2 * 32 * groups * 128:,}." in card
    assert "Meta" in card
    if licence == "llama3":
        with pytest.raises(ValueError, match="begins with 'Llama-3', got 'org/x'"):
            conversion_card("x", config, "org/x", "somewhere")
    config.base_model_name_or_path = "someone/else"
    with pytest.raises(ValueError, match="the licence of someone/else is not known"):
        conversion_card(name, config, f"org/{name}", "somewhere")


def test_a_conversion_is_assembled(tmp_path, monkeypatch):
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    added = make_checkpoint(tmp_path / "cache", tmp_path / "added", base_model_name_or_path=None)
    model, processor = load_model(added, str(tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct"))
    model.config.base_model_name_or_path = None
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    options = {"folder": tmp_path / "repo", "repo_id": "org/xc-llama-2-7b", "results": RESULTS}
    with pytest.raises(ValueError, match="names no base model; give its Hub id with --base-model"):
        assemble_model(tmp_path / "whole", **options)
    options["base"] = "meta-llama/Llama-2-7b-hf"
    with pytest.raises(ValueError, match="is a whole model: say with --original where its checkpoint came from"):
        assemble_model(tmp_path / "whole", **options)
    assert not (tmp_path / "repo").exists()
    assembled, _ = assemble_model(tmp_path / "whole", **options, original="ServiceNow/a-checkpoint")
    card = (tmp_path / "repo" / "README.md").read_text()
    assert "license: llama2" in card
    assert f"base_model_digest: {assembled.base_digest()}" in card
    config = json.loads((tmp_path / "repo" / "config.json").read_text())
    assert config["base_model_name_or_path"] == "meta-llama/Llama-2-7b-hf"
    assert (tmp_path / "repo" / "modeling_xcllama.py").is_file()


def test_a_model_with_an_encoder_is_assembled(tmp_path, monkeypatch):
    """Its card names both base models, and no file a folder of this machine."""
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    name = "sentence-transformers/all-MiniLM-L6-v2"
    encoder = tmp_path / "cache" / "models" / "all-MiniLM-L6-v2"
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=320, **sizes)).save_pretrained(encoder)
    fields = {"context_layer": None, "encoder_name_or_path": name}
    # one of its two layers is kept, and trained
    kept = BertModel.from_pretrained(encoder, num_hidden_layers=1)
    added = make_checkpoint(tmp_path / "cache", tmp_path / "xc-enc", kept, **fields)
    recipe = yaml.safe_load((added / "recipe.yaml").read_text())
    recipe["model"] |= {"encoder": "all-MiniLM-L6-v2", "encoder_layers": 1, "train_encoder": True}
    (added / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    AutoTokenizer.from_pretrained(tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct").save_pretrained(encoder)
    model, processor = assemble_model(added, tmp_path / "repo", "org/xc-enc", RESULTS)
    expected = answer(model, processor, model.encode_context(**processor(contexts=["a b"], return_tensors="pt")), "c")
    # the folder needs neither base nor encoder
    shutil.rmtree(tmp_path / "cache")
    loaded = XCLlamaForCausalLM.from_pretrained(tmp_path / "repo").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "repo", trust_remote_code=True)
    cache = loaded.encode_context(**processor(contexts=["a b"], return_tensors="pt"))
    require_equal(tmp_path / "repo", answer(loaded, processor, cache, "c"), expected)
    card = (tmp_path / "repo" / "README.md").read_text()
    assert check_card(card, "card")["base_model"] == [BASE, name]
    line = f"| encoder | {name}, its first 1 layers, trained with the added layers |"
    assert line in card
    assert line in readme(added, RESULTS)
    assert "last layer, 24 values wide" in card
    for path in (tmp_path / "repo").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path


def test_an_adapter_is_assembled_and_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    adapter = make_adapter(tmp_path / "cache", tmp_path / "lora-prompt")
    assert Release("model", "org", "v1", checkpoint=adapter).jobs == [("adapter", "org/lora-prompt", adapter)]
    assembled = assemble_adapter(adapter, tmp_path / "repo", "org/lora-prompt", RESULTS)
    check_adapter(tmp_path / "repo", *assembled)
    card = (tmp_path / "repo" / "README.md").read_text()
    header = check_card(card, "card")
    fields = ("library_name", "base_model_relation", "base_model")
    assert [header[field] for field in fields] == ["peft", "adapter", [BASE]]
    assert f"`{header['base_model_digest']}`" in card
    assert "on q_proj, v_proj" in card
    # its own runs stand in the evaluation of the checkpoint that it is compared with
    evaluation = read_result(RESULTS, f"eval_{DEFAULT}")
    own = [run for run in evaluation["runs"] if run["method"] == "lora-prompt / LoRA / prompt"]
    assert card.count("| lora-prompt / LoRA / prompt |") == len(own)
    assert len(ModelCard(card).data.eval_results) >= len(own)
    assert not (tmp_path / "repo" / "config.json").exists()
    entries = tmp_path / "repo" / ".eval_results" / "xcllama.yaml"
    # without a run of its own there is nothing to list
    assert len(yaml.safe_load(entries.read_text()) or () if entries.exists() else ()) == len(own)
    trained = json.loads((adapter / "training.json").read_text())
    (adapter / "training.json").write_text(json.dumps(trained | {"base_digest": "0" * 64}))
    with pytest.raises(ValueError, match="was trained on a base of digest 000000000000"):
        assemble_adapter(adapter, tmp_path / "other", "org/lora-prompt", RESULTS)


@pytest.mark.parametrize("change", [{"tokens": [1]}, {"logits": [0.5, 0.8]}, {"logits": [0.5]}])
def test_a_folder_that_answers_differently_is_refused(change):
    expected = {"tokens": [0], "logits": [0.5, 0.5]}
    require_equal(Path("folder"), {"tokens": [0], "logits": [0.5, 0.51]}, expected)
    with pytest.raises(ValueError, match="folder differs from its source"):
        require_equal(Path("folder"), expected | change, expected)


def test_the_kernel_card(tmp_path):
    assemble_kernel(tmp_path / "kernel", "org/kernels", RESULTS)
    card = (tmp_path / "kernel" / "README.md").read_text()
    assert check_card(card, "card")["license"] == "apache-2.0"
    assert 'get_kernel("org/kernels", version=1' in card
    records = json.loads((RESULTS / "kernels_inspect.json").read_text())
    variants = Counter((row["kernel"], row["target"], row["dtype"]) for row in records["kernels"])
    template = ROOT / "kernels" / "CARD.md"
    assert strange_numbers(card, [records, list(variants.values())], template) == set()
    assert strange_numbers(card + "123456", [records, list(variants.values())], template) == {"123456"}


def test_the_card_of_the_data_mix():
    table = json.loads((RESULTS / "dataset_mix.json").read_text())
    card = render_card(table, "org/mix")
    check_card(card, "card")
    # the size of the whole in the header is a range
    ranges = [0, 1_000, 10_000, 100_000]
    assert strange_numbers(card, [table, ranges], FOLDER / "dataset_card.md.jinja") == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# No header\n", "begins with a YAML header"),
        ("---\ntags: [a]\n---\n# A\ntext\n", "at least `license`"),
        ("---\nlicense: mit\ntags: []\n---\n# A\ntext\n", "no value for tags"),
        ("---\nlicense: mit\n---\n# A\n## B\n\n## C\ntext\n", "the section 'B' is empty"),
        ("---\nlicense: mit\n---\n# A\ntext {{ slot }}\n", "an empty slot"),
        ("---\nlicense: mit\n---\n# A\nF1: None\n", "an empty slot"),
        ("---\nlicense: mit\n---\n# A\n[More Information Needed]\n", "an empty slot"),
    ],
)
def test_cards_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        check_card(text, "card")


def test_a_slot_without_a_value_is_refused():
    values = {"header": "license: mit", "name": "x", "repo_id": None}
    with pytest.raises(ValueError, match=r"conversion_card\.md\.jinja has an empty slot"):
        render("conversion_card.md.jinja", values)


def test_checkpoints_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XCLLAMA_CACHE", str(tmp_path / "cache"))
    folder = make_checkpoint(tmp_path / "cache", tmp_path / "tiny")
    assert (
        load_source(folder)[0].base_digest() == json.loads((folder / "config.json").read_text())["base_model_digest"]
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is no checkpoint: it has no config\.json"):
        load_source(tmp_path / "empty")
    shutil.copy(folder / "config.json", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"has no weights: neither cross_attention\.safetensors nor"):
        load_source(tmp_path / "empty")
    base = tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct"
    config = LlamaConfig.from_pretrained(base)
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(base)
    with pytest.raises(ValueError, match=r"was trained on a base of digest [0-9a-f]{12}, the one found has"):
        load_source(folder)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=r"belongs to HuggingFaceTB/SmolLM2-135M-Instruct, which cannot be found"):
        load_source(folder)
