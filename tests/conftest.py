"""Tiny random models for mechanics, and SmolLM2 for the few end-to-end tests."""

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the kernels run in Triton's interpreter; must precede the first import of triton
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dataset_builders.wheels import cache_folder
from modeling_xcllama import XCLlamaForCausalLM

# two OpenMP threads beside another busy process can be slower than one
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# one config for every way a block can be shaped
VARIANTS = {
    "default": {},
    "condensed": {"cross_attention_share_key_value": True},
    "middle_layer": {"context_layer": 2},
    "original": {
        "cross_attention_rope": True,
        "cross_attention_intermediate_size": 48,
        "cross_attention_norm": "layer_norm",
        "cross_attention_context_norm": False,
        "cross_attention_bias": True,
    },
    "condensed_rope": {"cross_attention_rope": True, "cross_attention_share_key_value": True},
    "shared_tanh": {"cross_attention_share_weights": True, "cross_attention_gate": "tanh"},
    "joint": {"cross_attention_mode": "joint", "context_layer": 2, "context_prefix": [3, 4]},
    "few_heads": {"cross_attention_num_key_value_heads": 1, "cross_attention_layers": [0, 1, 2, 3]},
}


def tiny_llama(seed: int = 0, **fields) -> LlamaForCausalLM:
    """A random Llama of 4 layers, float32, in eval mode."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(TINY | fields))).eval()


def sharpen(model: XCLlamaForCausalLM) -> XCLlamaForCausalLM:
    """Scale random weights up, so that what a row reads shows in its logits and tokens."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.added_parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)
            elif "gate" in name:
                weight.fill_(1.0)
    model.model.context_fingerprint()
    return model


def scale(weights: Iterable[torch.nn.Parameter], factor: float) -> None:
    """Multiply the matrices among `weights`."""
    with torch.no_grad():
        for weight in weights:
            if weight.dim() > 1:
                weight.mul_(factor)


@pytest.fixture(scope="session")
def make_sharp_llama() -> Callable[..., LlamaForCausalLM]:
    """A `tiny_llama` whose every token changes what it writes, without an end token."""

    def make(seed: int = 0, **fields) -> LlamaForCausalLM:
        base = tiny_llama(seed, **({"max_position_embeddings": 512, "eos_token_id": None} | fields))
        scale(base.parameters(), 15)
        return base

    return make


@pytest.fixture(scope="session")
def make_sharp_model(make_sharp_llama) -> Callable[..., XCLlamaForCausalLM]:
    """A random XC model, ungated, whose every token and every context changes what it writes."""

    def make(base: LlamaForCausalLM | None = None, seed: int = 0, **fields) -> XCLlamaForCausalLM:
        base = base or make_sharp_llama(seed)
        torch.manual_seed(seed)
        fields = {"cross_attention_layers": [1, 3], "cross_attention_gate": None} | fields
        model = XCLlamaForCausalLM.from_decoder(base, init="random", **fields)
        scale((weight for _, weight in model.added_parameters()), 20)
        model.model.context_fingerprint()
        return model

    return make


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """`tiny_llama`, for tests that need another config."""
    return tiny_llama


@pytest.fixture
def make_model() -> Callable[..., XCLlamaForCausalLM]:
    """An XC model around a base, its random weights scaled up by `sharpen`."""
    return lambda base, **fields: sharpen(XCLlamaForCausalLM.from_decoder(base, **fields))


@pytest.fixture
def variants() -> dict[str, dict]:
    return VARIANTS


@pytest.fixture
def tiny_base() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def tiny_model(tiny_base) -> XCLlamaForCausalLM:
    return sharpen(XCLlamaForCausalLM.from_decoder(tiny_base))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant_model(request, tiny_base) -> XCLlamaForCausalLM:
    return sharpen(XCLlamaForCausalLM.from_decoder(tiny_base, **request.param))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two questions and two contexts (the second shorter, padded on the right)."""
    generator = torch.Generator().manual_seed(2)
    context = torch.randint(3, 97, (2, 11), generator=generator)
    mask = torch.ones_like(context)
    mask[1, 6:] = 0
    return {
        "input_ids": torch.randint(3, 97, (2, 7), generator=generator),
        "context_input_ids": context,
        "context_attention_mask": mask,
    }


def model_folder(name: str) -> Path:
    """The folder of a real model that `make models` fetched; skips where it was not."""
    folder = cache_folder() / "models" / name
    if not folder.exists():
        pytest.skip(f"{name} is not there: run `make models`")
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    return model_folder("SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    return model_folder("all-MiniLM-L6-v2")


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """The URL of an empty S3 bucket on loopback; the environment tells clients where it is."""
    server = pytest.importorskip("moto.server", reason="the extra `dev` is not installed")
    s3fs = pytest.importorskip("s3fs", reason="the extra `store-cluster` is not installed")
    thread = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    thread.start()
    host, port = thread.get_host_and_port()
    values = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (values | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    # the servers of a process share their buckets
    name = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    thread.stop()
    s3fs.S3FileSystem.clear_instance_cache()
