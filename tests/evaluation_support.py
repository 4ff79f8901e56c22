"""What tests of the evaluation command share: a tiny checkpoint, its arguments, what a run wrote."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

FIXTURES = Path(__file__).parent / "fixtures"
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", "What", "Who", "is", "the", "a", "in", "of", "Question", "Answer", ":"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


@pytest.fixture
def checkpoint(tmp_path, make_llama, make_model):
    """Folder of a tiny random XC checkpoint whose base lies beside it."""
    make_llama(max_position_embeddings=2048).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    make_model(str(tmp_path / "base"), context_layer=2).save_cross_attention(tmp_path / "xc")
    return str(tmp_path / "xc")


def metadata(**paths: str) -> str:
    paths = {source: str(FIXTURES / name) for source, name in paths.items()}
    return json.dumps({"paths": paths, "bertscore_model": "none", "split": "all"})


def model_arguments(checkpoint: str, mode: str = "cross", **options) -> list[str]:
    values = {"pretrained": checkpoint, "context_mode": mode, "dtype": "float32", **options}
    pairs = ",".join(f"{key}={value}" for key, value in values.items())
    return ["--model", "xcllama", "--model_args", pairs, "--device", "cpu"]


def results(folder: Path) -> dict:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())


def samples(folder: Path, task: str) -> list[dict]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]
