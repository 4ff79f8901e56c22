"""Bases that are offloaded, quantized or adapted: the added layers stay whole, in 16 bit, and trainable."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from modeling_xcllama import XCLlamaForCausalLM
from modeling_xcllama.added_modules import keep_added_modules

FIELDS = {"cross_attention_layers": [1, 3], "cross_attention_gate": None}


def build_base(dtype=torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=None,
    )
    base = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in base.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    return base.to(dtype)


def build_model(base=None, **fields) -> XCLlamaForCausalLM:
    model = XCLlamaForCausalLM.from_decoder(base or build_base(), **FIELDS | fields)
    with torch.no_grad():
        for _, weight in model.added_parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    return model.eval()


def random_ids(*shape, seed=1):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def build_encoder() -> BertModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return BertModel(BertConfig(**sizes, vocab_size=97)).eval()


@pytest.mark.parametrize("kind", ["hidden", "condensed", "encoder"])
@pytest.mark.parametrize("cpu_bytes", [10**9, 200_000], ids=["cpu", "cpu_and_disk"])
def test_device_map_auto(tmp_path, cpu_bytes, kind):
    """Encoding, projecting and generating with weights on disk equal those with all of them in memory."""
    encoder = build_encoder() if kind == "encoder" else None
    model = build_model(encoder=encoder, cross_attention_share_key_value=kind == "condensed")
    model.save_pretrained(tmp_path / "model")
    placed = XCLlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": cpu_bytes}, offload_folder=tmp_path / "offload"
    )
    on_disk = [name for name, weight in placed.named_parameters() if weight.is_meta]
    assert bool(on_disk) == (cpu_bytes < 10**9)
    if on_disk:
        assert any(".layers." in name for name in on_disk)
        assert any("cross_attention_blocks" in name for name in on_disk)
        assert encoder is None or any(".encoder." in name for name in on_disk)
    ids, prompts = random_ids(2, 21), random_ids(2, 5, seed=2)
    cache = placed.encode_context(ids)
    expected = model.encode_context(ids)
    assert cache.fingerprint == expected.fingerprint
    for name, state in expected.states.items():
        torch.testing.assert_close(cache.states[name], state)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        placed.generate(prompts, context_cache=cache, **options),
        model.generate(prompts, context_cache=expected, **options),
    )


class RowScaledLinear(nn.Linear):
    """What bitsandbytes' layers look like: a Linear with integer weights and a state of its own."""

    def __init__(self, source: nn.Linear):
        super().__init__(source.in_features, source.out_features, bias=source.bias is not None, device="meta")
        weight = source.weight.detach().float()
        self.scale = weight.abs().amax(-1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, inputs):
        return (inputs.float() @ (self.weight.float() * self.scale).T).to(inputs.dtype)


def stand_in(tmp_path) -> LlamaForCausalLM:
    base = build_base(torch.bfloat16)
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            base.set_submodule(name, RowScaledLinear(module))
    return base


def quantized_by_torchao(tmp_path) -> LlamaForCausalLM:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'xcllama[quantization]'")
    build_base(torch.bfloat16).save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=torchao_config(), dtype=torch.bfloat16
    )


def torchao_config():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


BITSANDBYTES = {
    "bitsandbytes_8bit": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes_4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def quantized_by_bitsandbytes(tmp_path, name) -> LlamaForCausalLM:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'xcllama[quantization]'")
    build_base(torch.bfloat16).save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BITSANDBYTES[name], dtype=torch.bfloat16, device_map="cpu"
    )


QUANTIZED = {"stand_in": stand_in, "torchao": quantized_by_torchao}
QUANTIZED |= {name: partial(quantized_by_bitsandbytes, name=name) for name in BITSANDBYTES}
# `make test-slow` installs them: they take seconds to import, and log on machines without a GPU
LIBRARIES = [pytest.param(name, marks=pytest.mark.slow) for name in ("torchao", *BITSANDBYTES)]


def is_quantized(module: nn.Linear) -> bool:
    return type(module) is not nn.Linear or type(module.weight) is not nn.Parameter


def check_added_layers(model, initialization="self_attention"):
    """The decoder quantized, the added layers plain 16-bit parameters that alone are trained."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert all(is_quantized(module) for name, module in linear.items() if ".layers." in name)
    added = dict(model.added_parameters())
    assert added
    for name, weight in added.items():
        assert type(weight) is nn.Parameter
        assert weight.dtype == torch.bfloat16
        assert weight.requires_grad, name
    assert all(name in added for name, weight in model.named_parameters() if weight.requires_grad)


@pytest.mark.parametrize("name", ["stand_in", *LIBRARIES])
def test_quantized_bases(name, tmp_path):
    """The added layers copy the decoder's weights as they were quantized, read caches, and are saved and loaded."""
    base = QUANTIZED[name](tmp_path)
    model = build_model(base, cross_attention_gate="scalar")
    check_added_layers(model)
    exact = build_model(build_base(torch.bfloat16), cross_attention_gate="scalar")
    # relative errors of the weights, and of what the logits make of them
    of_weights, of_logits = (0.1, 0.4) if name.endswith("4bit") else (0.02, 0.2)
    for (key, ours), (_, theirs) in zip(model.added_parameters(), exact.added_parameters(), strict=True):
        assert (ours - theirs).float().norm() <= of_weights * theirs.float().norm(), key
    cache = model.encode_context(random_ids(2, 21))
    prompts = random_ids(2, 5, seed=2)
    with torch.no_grad():
        bare, got = model(prompts).logits, model(prompts, context_cache=cache).logits
        full = exact(prompts, context_cache=exact.encode_context(random_ids(2, 21))).logits
    assert (got - bare).abs().max() > 0.01
    assert (got - full).float().norm() < of_logits * full.float().norm()
    assert model.generate(prompts, context_cache=cache, max_new_tokens=4, do_sample=False).shape == (2, 9)
    model.save_cross_attention(tmp_path / "added")
    again = build_model(QUANTIZED[name](tmp_path), cross_attention_gate="scalar", init="random")
    again.load_cross_attention(tmp_path / "added")
    with torch.no_grad():
        torch.testing.assert_close(again(prompts, context_cache=cache).logits, got)


# on a CPU, the product of 4-bit weights that bitsandbytes packed for inference has no gradient
@pytest.mark.parametrize("name", ["stand_in", *(name for name in LIBRARIES if "4bit" not in name.values[0])])
def test_training_beside_a_quantized_base(name, tmp_path):
    """Gradients of the added layers, above and below quantized ones, point where those of the exact base do."""
    prompts, gradients = random_ids(2, 5, seed=2), []
    for base in (QUANTIZED[name](tmp_path), build_base(torch.bfloat16)):
        model = build_model(base, cross_attention_gate="scalar")
        cache = model.encode_context(random_ids(2, 21))
        model.train()(prompts, context_cache=cache, labels=prompts).loss.backward()
        gradients.append([weight.grad.float().flatten() for _, weight in model.added_parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.98


@pytest.mark.parametrize("name", LIBRARIES)
def test_from_pretrained_quantizes_the_decoder_only(name, tmp_path):
    library = name.partition("_")[0]
    pytest.importorskip(library, reason=f"{library} is not installed: pip install 'xcllama[quantization]'")
    model = build_model(build_base(torch.bfloat16))
    model.save_pretrained(tmp_path / "model")
    config = torchao_config() if name == "torchao" else BITSANDBYTES[name]
    loaded = XCLlamaForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    check_added_layers(loaded)
    assert not is_quantized(loaded.lm_head)
    cache = loaded.encode_context(random_ids(2, 21))
    assert loaded.generate(random_ids(2, 5), context_cache=cache, max_new_tokens=4, do_sample=False).shape == (2, 9)


def test_a_quantization_config_as_a_dict():
    """`from_pretrained` takes both forms, and so do we."""
    kept = keep_added_modules({"load_in_8bit": True}).llm_int8_skip_modules
    assert kept == keep_added_modules(BITSANDBYTES["bitsandbytes_8bit"]).llm_int8_skip_modules
    assert {"lm_head", "model.cross_attention_blocks", "model.context_projections", "model.encoder"} <= set(kept)


def test_lora_beside_the_added_layers(tmp_path):
    """peft's adapters on the decoder and our layers: both train, the base does not, and both come back."""
    model = build_model()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    first = model.model.context_fingerprint()
    contexts, prompts = random_ids(2, 21), random_ids(2, 9, seed=2)
    targets = r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    for _, weight in model.added_parameters():
        weight.requires_grad_(True)
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    assert len(trained) == 4 * 2 * 2 + len(list(model.added_parameters()))
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(8):
        loss = adapted(prompts, context_input_ids=contexts, labels=prompts).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    added = {name for name, _ in model.added_parameters()}
    for name, weight in model.named_parameters():
        same = "lora_" in name or torch.equal(weight, before[name.replace(".base_layer", "")])
        assert same != (name in added), name
    adapted.eval().save_pretrained(tmp_path / "adapter")
    model.save_cross_attention(tmp_path / "added")

    loaded = build_model()
    loaded.load_cross_attention(tmp_path / "added")
    again = PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    own, theirs = loaded.encode_context(contexts), model.encode_context(contexts)
    # the adapters are part of what encodes
    assert own.fingerprint == theirs.fingerprint != first
    with torch.no_grad():
        expected = adapted(prompts, context_cache=theirs).logits
        torch.testing.assert_close(again(prompts, context_cache=own).logits, expected)
    options = {"max_new_tokens": 5, "do_sample": False}
    got = again.generate(input_ids=prompts, context_cache=own, **options)
    assert torch.equal(got, adapted.generate(input_ids=prompts, context_cache=theirs, **options))
    with pytest.raises(ValueError, match="made by another model"):
        build_model()(prompts, context_cache=own)
