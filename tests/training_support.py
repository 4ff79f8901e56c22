"""A tiny decoder on disk, rows to train on, and recipes over them; loaded by the training tests."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xcllama.training.build import build_model, load_processor
from xcllama.training.checkpoints import checkpoints
from xcllama.training.examples import ExamplePlan
from xcllama.training.objectives import Objective
from xcllama.training.passages import read_passages
from xcllama.training.prompts import Prompts
from xcllama.training.recipe import Recipe, recipe_from_dict
from xcllama.training.run import make_collator
from xcllama.training.stored_states import encode_in_memory

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
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        eos_token_id=256,
        pad_token_id=256,
        tie_word_embeddings=True,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharp_folder(base_folder, tmp_path_factory) -> Path:
    """The same decoder with weights so large that what it reads shows in what it says."""
    folder = shutil.copytree(base_folder, tmp_path_factory.mktemp("sharp") / "base")
    base = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in base.parameters():
            weight.mul_(15 if weight.dim() > 1 else 1)
    base.save_pretrained(folder)
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
        rows.append(
            row | {"answer": str(index + 3), "answers": [str(index + 3)], "answerable": True, "question_type": ""}
        )
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
