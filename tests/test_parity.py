"""A checkpoint of the original code, converted: its logits and tokens, and those of variants against plain math."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "original_tiny.safetensors"


@pytest.fixture(scope="module")
def reference() -> dict:
    with safe_open(FIXTURE, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(FIXTURE)
    fields = json.loads(metadata["base_config"]) | json.loads(metadata["cross_attention"])
    weights = {name.removeprefix("weight."): tensors[name] for name in tensors if name.startswith("weight.")}
    return tensors | {"config": fields, "weights": weights}


@pytest.fixture(scope="module")
def converter():
    """scripts/convert_checkpoint.py as a module."""
    spec = importlib.util.spec_from_file_location("converter", ROOT / "scripts" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def convert(converter, tmp_path):
    """Write a checkpoint of the original, convert it and load the result through the Auto class."""

    def run(config: dict, weights: dict, pickled: bool = False):
        source = tmp_path / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        if pickled:
            torch.save(weights, source / "pytorch_model.bin")
        else:
            save_file(weights, source / "model.safetensors")
        converter.convert(source, tmp_path / "converted")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "converted", trust_remote_code=True)

    return run


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pytorch_bin"])
def test_original_logits_and_tokens(reference, convert, pickled):
    model = convert(reference["config"], reference["weights"], pickled)
    ids, mask = reference["context_input_ids"], reference["context_attention_mask"]
    direct = model(reference["input_ids"], context_input_ids=ids, context_attention_mask=mask).logits
    torch.testing.assert_close(direct, reference["logits"], atol=1e-4, rtol=0)
    cache = model.encode_context(ids, mask)
    valid = mask.bool()
    torch.testing.assert_close(cache.states["hidden"], reference["context_states"][valid], atol=1e-5, rtol=0)
    cached = model(reference["input_ids"], context_cache=cache).logits
    torch.testing.assert_close(cached, reference["logits"], atol=1e-4, rtol=0)
    steps = reference["generated"].shape[1] - reference["input_ids"].shape[1]
    options = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(reference["input_ids"], context_cache=cache, **options), reference["generated"])


def rotated(states: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE on `[batch, heads, length, dim]` at positions 0..length-1."""
    dim, length = states.shape[-1], states.shape[-2]
    frequencies = theta ** (-torch.arange(0, dim, 2).float() / dim)
    angles = torch.arange(length).float()[:, None] * frequencies
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def plain_block(hidden, context, weights: dict, prefix: str, config: dict) -> torch.Tensor:
    """The original's block as DESIGN describes it, on one unpadded row."""

    def linear(name, states):
        name = f"{prefix}.{name}"
        return functional.linear(states, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name, states):
        weight, bias = weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"]
        return functional.layer_norm(states, weight.shape, weight, bias, config["rms_norm_eps"])

    heads, groups = config["cross_attn_num_attention_heads"], config["cross_attn_num_key_value_heads"]
    dim = config["cross_attn_hidden_size"] // heads
    query = linear("crossattention.q_proj", norm("ln_1", hidden)).unflatten(-1, (heads, dim)).transpose(1, 2)
    key = linear("crossattention.k_proj", context).unflatten(-1, (groups, dim)).transpose(1, 2)
    value = linear("crossattention.v_proj", context).unflatten(-1, (groups, dim)).transpose(1, 2)
    query, key = rotated(query, config["rope_theta"]), rotated(key, config["rope_theta"])
    key, value = (part.repeat_interleave(heads // groups, 1) for part in (key, value))
    attended = (query @ key.transpose(-1, -2) / dim**0.5).softmax(-1) @ value
    hidden = hidden + linear("crossattention.o_proj", attended.transpose(1, 2).flatten(2))
    inner = norm("ln_2", hidden)
    return hidden + linear(
        "mlp.down_proj", functional.silu(linear("mlp.gate_proj", inner)) * linear("mlp.up_proj", inner)
    )


def plain_logits(ids, context_ids, config: dict, weights: dict) -> torch.Tensor:
    """Logits of the original, from the decoder's own layers and `plain_block` before or after some of them."""
    llama = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in config.items() if not k.startswith(("cross_", "n_cross"))})
    )
    decoder = {
        name.replace("transformer.", "model."): tensor
        for name, tensor in weights.items()
        if not name.startswith("cross_attn_layers.")
    }
    llama.load_state_dict(decoder)
    states = llama(context_ids, output_hidden_states=True).hidden_states[-1]
    last = config["num_hidden_layers"] - 1
    layers = [last - index * config["cross_attn_layers_stride"] for index in range(config["n_cross_attn_layers"])]

    def read(index, hidden):
        number = last if config["cross_attn_shared_weights"] else index
        return plain_block(hidden, states, weights, f"cross_attn_layers.{number}", config)

    for index in layers:
        layer = llama.model.layers[index]
        if config["cross_attn_final_layer"]:
            layer.register_forward_hook(lambda _, __, output, index=index: read(index, output))
        else:
            layer.register_forward_pre_hook(lambda _, inputs, index=index: (read(index, inputs[0]), *inputs[1:]))
    return llama(ids).logits


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cross_attn_shared_weights": True},
        {"cross_attn_attention_bias": True},
        {"cross_attn_num_key_value_heads": 2},
        {"cross_attn_num_key_value_heads": 1, "cross_attn_final_layer": False},
        {"n_cross_attn_layers": 3, "cross_attn_shared_weights": True, "cross_attn_attention_bias": True},
    ],
    ids=["original", "shared", "bias", "grouped", "before", "all"],
)
@torch.no_grad()
def test_variants_of_the_original(reference, convert, fields):
    config = reference["config"] | fields
    generator = torch.Generator().manual_seed(0)
    weights = {k: v for k, v in reference["weights"].items() if not k.startswith("cross_attn_layers.")}
    last, inner = config["num_hidden_layers"] - 1, config["cross_attn_hidden_size"]
    layers = [last - index * config["cross_attn_layers_stride"] for index in range(config["n_cross_attn_layers"])]
    key_width = inner // config["cross_attn_num_attention_heads"] * config["cross_attn_num_key_value_heads"]
    for index in layers[:1] if config["cross_attn_shared_weights"] else layers:
        prefix = f"cross_attn_layers.{index}"
        shapes = {"q_proj": (inner, 64), "k_proj": (key_width, 64), "v_proj": (key_width, 64), "o_proj": (64, inner)}
        for name, shape in shapes.items():
            weights[f"{prefix}.crossattention.{name}.weight"] = 0.2 * torch.randn(shape, generator=generator)
            if config["cross_attn_attention_bias"]:
                weights[f"{prefix}.crossattention.{name}.bias"] = 0.2 * torch.randn(shape[0], generator=generator)
        for name, shape in {
            "gate_proj": (4 * inner, 64),
            "up_proj": (4 * inner, 64),
            "down_proj": (64, 4 * inner),
        }.items():
            weights[f"{prefix}.mlp.{name}.weight"] = 0.1 * torch.randn(shape, generator=generator)
        for name in ("ln_1", "ln_2"):
            weights[f"{prefix}.{name}.weight"] = 1 + 0.1 * torch.randn(64, generator=generator)
            weights[f"{prefix}.{name}.bias"] = 0.1 * torch.randn(64, generator=generator)
    model = convert(config, weights)
    ids, context = reference["input_ids"], reference["context_input_ids"][:1]
    expected = plain_logits(ids[:1], context, config, weights)
    torch.testing.assert_close(model(ids[:1], context_input_ids=context).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cross_attn_skip_connections": True}, "`cross_attn_skip_connections` is true"),
        ({"n_cross_attn_layers": 3, "cross_attn_final_layer": False, "cross_attn_layers_stride": 3}, "before layer 0"),
    ],
)
def test_what_cannot_be_converted_is_named(reference, convert, fields, message):
    with pytest.raises(ValueError, match=message):
        convert(reference["config"] | fields, reference["weights"])


def test_missing_weights_are_named(reference, convert):
    weights = {name: tensor for name, tensor in reference["weights"].items() if "ln_2.bias" not in name}
    with pytest.raises(ValueError, match=r"weights missing: .*mlp_norm\.bias"):
        convert(reference["config"], weights)


def test_command_line(reference, converter, tmp_path, monkeypatch, capsys):
    source = tmp_path / "source"
    source.mkdir()
    save_file(reference["weights"], source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(reference["config"]))
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", str(source), str(tmp_path / "out")])
    assert converter.main() == 0
    assert (tmp_path / "out" / "modeling_xcllama.py").exists()
    config = {key: value for key, value in reference["config"].items() if key != "n_cross_attn_layers"}
    (source / "config.json").write_text(json.dumps(config))
    assert converter.main() == 1
    assert "lacks the field 'n_cross_attn_layers'" in capsys.readouterr().err
