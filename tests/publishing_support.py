"""What the tests of publishing share: a Hub on loopback for this process, and a tiny checkpoint with real records."""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, HfFileSystem, constants
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import hub

from modeling_xcllama import XCLlamaForCausalLM
from modeling_xcllama.fingerprint import weights_digest
from xcllama.publishing.uploading import Target, compare, upload

TESTS = Path(__file__).resolve().parent
CHECKPOINT = TESTS.parent / "checkpoints" / "xc-smollm2-135m"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKEN = "hf_only_this_one"
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


@contextmanager
def hub_on_loopback(root: Path) -> Iterator:
    """A server that only `TOKEN` may write to; the clients of this process talk to it. Yields the server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS)
        import minihub

        server = minihub.serve(root / "server", token=TOKEN)
        server.url = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        values = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        values |= {"HF_HUB_CACHE": str(root / "cache"), "HF_TOKEN_PATH": str(root / "token")}
        for name, value in values.items():
            patch.setattr(constants, name, value)
        # transformers keeps the client that it made first, and with it the URL of an earlier server
        patch.setattr(hub, "_hf_api", None)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield server
        server.shutdown()
        # a socket that only listens would let clients wait for ever
        server.server_close()
        for name in [name for name in sys.modules if name.startswith("minihub")]:
            del sys.modules[name]


def make_base(cache: Path) -> Path:
    """A tiny random decoder in the folder `cache` (XCLLAMA_CACHE), by the name of the real one."""
    torch.manual_seed(0)
    base = cache / "models" / BASE.rpartition("/")[2]
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=1, pad_token_id=0)).save_pretrained(base)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {token: index + 2 for index, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(base)
    return base


def make_checkpoint(cache: Path, folder: Path, encoder: PreTrainedModel | None = None, **fields) -> Path:
    """Added weights of a tiny random model on `make_base`, with the training records of the repository's own
    checkpoint, so that its card is filled from the real results/."""
    base = make_base(cache)
    fields = {"context_layer": 2, "cross_attention_layers": [1, 2], "base_model_name_or_path": BASE} | fields
    model = XCLlamaForCausalLM.from_decoder(str(base), encoder, **fields)
    with torch.no_grad():
        for _, weight in model.added_parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)
    model.save_cross_attention(folder)
    for name in ("training.json", "recipe.yaml"):
        shutil.copy(CHECKPOINT / name, folder)
    return folder


def make_adapter(cache: Path, folder: Path) -> Path:
    """A random LoRA adapter on `make_base`, with records such as `xcllama train` exports."""
    base = LlamaForCausalLM.from_pretrained(make_base(cache))
    digest = weights_digest(base.named_parameters(), sampled=True)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(folder, save_embedding_layers=False)
    trained = json.loads((CHECKPOINT / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(trained | {"recipe": folder.name, "base_digest": digest}))
    recipe = yaml.safe_load((CHECKPOINT / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"method": "lora_prompt"}))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}!{% endfor %}")
    return folder


def values_in(data) -> Iterator:
    """All numbers and strings of a JSON document, keys too."""
    if isinstance(data, dict):
        yield from data
        for value in data.values():
            yield from values_in(value)
    elif isinstance(data, list):
        for value in data:
            yield from values_in(value)
    elif data is not None:
        yield data


def written(value) -> set[str]:
    """The ways a card may write a value: rounded, in hours, in per cent; of a string the numbers in it."""
    if isinstance(value, str):
        return set(NUMBER.findall(value))
    scaled = (value, value / 3600, 100 * value)
    return {str(value)} | {f"{number:{form}}" for number in scaled for form in (",.0f", ".0f", ".1f", ".2f", ".3f")}


def strange_numbers(card: str, data: list, *templates: Path) -> set[str]:
    """Numbers of a card that are neither among the values of `data` nor in the words of its templates."""
    allowed = set().union(*(written(value) for value in values_in(data)))
    words = [re.sub(r"\{[{%].*?[%}]\}", "", template.read_text(), flags=re.DOTALL) for template in templates]
    return set(NUMBER.findall(card)) - allowed - set(NUMBER.findall("".join(words)))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    HfFileSystem.clear_instance_cache()
    with hub_on_loopback(tmp_path_factory.mktemp("hub")) as server:
        yield server
    HfFileSystem.clear_instance_cache()


@pytest.fixture
def quiet(server, tmp_path, monkeypatch):
    """Each test begins with a healthy server and an empty cache; the clients do not wait between attempts."""
    server.store.faults.clear()
    server.store.role, server.store.organizations = "write", []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def model_target(name: str, **fields) -> Target:
    return Target(
        **({"repo_id": f"tester/{name}", "repo_type": "model", "marker": "config.json", "tag": "v1"} | fields)
    )


def push(folder: Path, target: Target) -> str:
    api = HfApi()
    return upload(api, folder, target, compare(api, folder, target), "test")


def tree(repo_id: str, **where) -> dict[str, int]:
    entries = HfApi().list_repo_tree(repo_id, recursive=True, **where)
    return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
