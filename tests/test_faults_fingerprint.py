"""A cache's fingerprint follows whatever shapes its states, and nothing that can be edited beside the weights."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from modeling_xcllama import XCLlamaForCausalLM, fingerprint
from modeling_xcllama.fingerprint import weights_digest

IDS = torch.arange(3, 14)[None]
LORA = {"r": 4, "target_modules": r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)", "init_lora_weights": False}


def tiny_encoder() -> BertModel:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=97, max_position_embeddings=64, **sizes)).eval()


@pytest.fixture(params=["decoder", "middle", "condensed", "encoder"])
def model(request, tiny_base, make_model) -> XCLlamaForCausalLM:
    fields = {
        "decoder": {},
        "middle": {"context_layer": 2},
        "condensed": {"cross_attention_share_key_value": True},
        "encoder": {"encoder": tiny_encoder()},
    }
    return make_model(tiny_base, init="random", **fields[request.param])


def encoding_weight(model: XCLlamaForCausalLM) -> torch.nn.Parameter:
    """A weight that shapes the states of `model`."""
    encoder = model.model.encoder
    return (
        model.model.layers[1].mlp.up_proj.weight if encoder is None else encoder.encoder.layer[1].output.dense.weight
    )


def refuses(model: XCLlamaForCausalLM, cache) -> bool:
    """Whether every way of reading `cache` raises."""
    for read in (model, model.generate):
        with pytest.raises(ValueError, match="made by another model, template or version of the weights"):
            read(IDS, context_cache=cache)
    return True


def fused_steps(model: XCLlamaForCausalLM, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2, fused=True)
    for _ in range(steps):
        model.train()(IDS, context_input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("kind", ["condensed", "encoder"])
def test_fused_optimizers(tiny_base, make_model, kind):
    fields = {"encoder": tiny_encoder()} if kind == "encoder" else {"cross_attention_share_key_value": True}
    model = make_model(tiny_base, init="random", **fields)
    cache = model.encode_context(IDS)
    fused_steps(model)
    state = model.encode_context(IDS).states
    assert max((state[name] - cache.states[name]).abs().max() for name in state) > 0.1
    assert refuses(model, cache)


def test_fused_training_of_what_encodes_nothing_keeps_caches(tiny_model):
    cache = tiny_model.encode_context(IDS)
    fused_steps(tiny_model)
    tiny_model(IDS, context_cache=cache)


def test_the_checkpoints_of_a_trainer(tiny_base, make_model, tmp_path):
    model = make_model(tiny_base, cross_attention_share_key_value=True, init="random")
    rows = [{"input_ids": IDS[0], "context_input_ids": IDS[0], "labels": IDS[0]}] * 4
    options = {"per_device_train_batch_size": 1, "max_steps": 3, "save_steps": 1, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(tmp_path, save_strategy="steps", disable_tqdm=True, **options)
    Trainer(model, arguments, train_dataset=rows).train()
    loaded = [XCLlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3)]
    prints = [one.model.context_fingerprint() for one in loaded]
    assert len(set(prints)) == 3
    assert prints == [one.config.context_fingerprint for one in loaded]


def assigned(model, weight) -> None:
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)


def one_element(model, weight) -> None:
    weight.data[3, 5] += 0.125


def replaced(model, weight) -> None:
    weight.data = weight.data + 0.01


CHANGES = {
    "load_state_dict_assign": assigned,
    "data_mul": lambda model, weight: weight.data.mul_(2),
    "data_assigned": replaced,
    "data_of_one_element": one_element,
    "no_grad_in_place": lambda model, weight: weight.detach()[0].zero_(),
    "swapped_rows": lambda model, weight: weight.data.copy_(weight.data.flip(0)),
    "rounded_frequencies": lambda model, weight: model.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_behind_the_version_counter(model, change):
    cache = model.encode_context(IDS)
    change(model, encoding_weight(model))
    assert refuses(model, cache)


def test_changes_to_settings_of_modules(tiny_model):
    cache = tiny_model.encode_context(IDS)
    tiny_model.model.layers[0].input_layernorm.variance_epsilon = 0.1
    assert refuses(tiny_model, cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_large_weights_are_sampled_and_seen(tiny_model, dtype):
    """Above 16 MiB one element of each row is looked at, and torch's own counter."""
    torch.manual_seed(0)
    tensors = {
        "embed": torch.nn.Parameter(torch.randn(8192, 1021).to(dtype)),
        "norm": torch.nn.Parameter(torch.ones(9)),
    }
    tensors["second"] = torch.nn.Parameter(torch.randn(2048, 513).to(dtype))
    kept, read = fingerprint.KeptDigest(), []
    sums = fingerprint._bit_sums
    fields = {"a": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "_bit_sums", lambda t, d: read.append(t.numel()) or sums(t, d))
        before = kept.of(tensors, fields)
        read.clear()
        assert kept.of(tensors, fields) == before
        # nothing of the weights' size is read again
        assert sum(read) < 0.01 * sum(tensor.numel() for tensor in tensors.values())
    prints = {before}
    for change in (
        lambda: tensors["embed"].data[77].add_(1),
        lambda: tensors["embed"].data[:, 5].add_(1),
        lambda: tensors["second"].data.mul_(1.25),
        lambda: tensors["second"].detach()[3, 3].add_(1),
        lambda: tensors["embed"].data.copy_(tensors["embed"].data.roll(1, 0)),
        lambda: setattr(tensors["embed"], "data", tensors["embed"].data.clone()),
        lambda: fields.update(a=2),
        lambda: tensors["norm"].data[2].add_(1),
    ):
        change()
        prints.add(kept.of(tensors, fields))
        assert kept.of(tensors, fields) == weights_digest(tensors.items(), fields)
    # a copy is the same weight
    assert len(prints) == 8


def test_one_digest_in_every_wider_dtype_and_memory_layout():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.randn(301, 77).to(dtype)
        digests = {weights_digest([("w", weight.to(wider))]) for wider in (dtype, torch.float32, torch.float64)}
        digests |= {weights_digest([("w", weight.T.contiguous().T)])}
        assert len(digests) == 1
        large = torch.randn(700, 301).to(dtype)
        assert weights_digest([("w", large)], sampled=True) == weights_digest([("w", large.double())], sampled=True)
        assert weights_digest([("w", weight.float() * (1 + 2**-20))]) not in digests
    assert weights_digest([("w", torch.tensor([0.0]))]) != weights_digest([("w", torch.tensor([-0.0]))])
    assert weights_digest([("w", torch.tensor([torch.nan]))]) != weights_digest([("w", torch.tensor([torch.inf]))])
    assert weights_digest([("w", torch.zeros(3, 4))]) != weights_digest([("w", torch.zeros(4, 3))])
    assert weights_digest([("w", torch.empty(0))]) != weights_digest([("w", torch.zeros(1))])


def test_adapters(tiny_base, make_model):
    """Trained, switched, disabled and merged: caches belong to what encodes, and come back with it."""
    model = make_model(tiny_base)
    plain = model.encode_context(IDS)
    adapted = get_peft_model(model, LoraConfig(**LORA)).eval()
    adapted.add_adapter("other", LoraConfig(**LORA))
    first = model.encode_context(IDS)
    assert refuses(model, plain)
    adapted.set_adapter("other")
    second = model.encode_context(IDS)
    assert refuses(model, first)
    with adapted.disable_adapter():
        # what encodes is the base
        assert model.encode_context(IDS).fingerprint == plain.fingerprint
        model(IDS, context_cache=plain)
        assert refuses(model, second)
    adapted.set_adapter("default")
    model(IDS, context_cache=first)
    for name, weight in adapted.named_parameters():
        if "lora_B.default" in name:
            weight.data.mul_(1.01)
    assert refuses(model, first)
    adapted.merge_adapter(["default"])
    merged = model.encode_context(IDS)
    assert len({cache.fingerprint for cache in (plain, first, second, merged)}) == 4
    adapted.unmerge_adapter()
    assert refuses(model, merged)
    adapted.merge_adapter(["default"])
    whole = adapted.merge_and_unload()
    whole(IDS, context_cache=whole.encode_context(IDS))
    assert refuses(whole, plain)


def test_trained_copies_of_modules(tiny_base, make_model):
    model = make_model(tiny_base)
    plain = model.encode_context(IDS)
    adapted = get_peft_model(model, LoraConfig(**LORA, modules_to_save=["embed_tokens"])).eval()
    copied = model.encode_context(IDS)
    model.get_input_embeddings().modules_to_save["default"].weight.data[5] += 1
    assert refuses(model, copied)
    with adapted.disable_adapter():
        model(IDS, context_cache=plain)


def test_adapters_of_layers_that_do_not_encode(tiny_base, make_model):
    model = make_model(tiny_base, context_layer=2)
    plain = model.encode_context(IDS)
    targets = r"model\.layers\.[23]\.self_attn\.q_proj"
    adapted = get_peft_model(model, LoraConfig(**LORA | {"target_modules": targets})).eval()
    adapted(input_ids=IDS, context_cache=plain)


OVERRIDES = {
    "context_layer": {"context_layer": 1},
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "sliding_window": {"sliding_window": 4},
    "windows": {"max_position_embeddings": 8},
    "hidden_act": {"hidden_act": "gelu"},
    "template_version": {"template_version": "0"},
}


@pytest.mark.parametrize("fields", OVERRIDES.values(), ids=OVERRIDES.keys())
def test_overrides_at_load_and_edited_configs(tiny_model, tmp_path, fields):
    tiny_model.save_pretrained(tmp_path / "model")
    cache = tiny_model.encode_context(IDS)
    cache.save(tmp_path / "cache.safetensors")
    # the file's own fingerprint says otherwise, and is not believed
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    assert config["context_fingerprint"] == cache.fingerprint
    overridden = XCLlamaForCausalLM.from_pretrained(tmp_path / "model", **fields)
    path.write_text(json.dumps(config | fields))
    for other in (overridden, XCLlamaForCausalLM.from_pretrained(tmp_path / "model")):
        assert refuses(other, cache)
        with pytest.raises(ValueError, match="made by another model"):
            other.load_context(tmp_path / "cache.safetensors")


def test_fields_that_shape_no_state(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    cache = tiny_model.encode_context(IDS)
    fields = {"context_layer": 4, "context_max_length": 100, "cross_attention_dropout": 0.5, "use_cache": False}
    other = XCLlamaForCausalLM.from_pretrained(tmp_path, **fields, attn_implementation="eager")
    other(IDS, context_cache=cache)


def test_an_edited_fingerprint_is_not_believed(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"context_fingerprint": "0" * 64}))
    loaded = XCLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.context_fingerprint() == config["context_fingerprint"]


def test_another_weights_file_in_the_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    cache = model.encode_context(IDS)
    names = [name for name, weight in model.named_parameters() if weight is encoding_weight(model)]
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[names[0]] += 0.01
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert refuses(XCLlamaForCausalLM.from_pretrained(tmp_path), cache)


def test_one_fingerprint_for_one_checkpoint(model, tmp_path):
    """In every process, dtype that holds the weights, and class."""
    expected = model.model.context_fingerprint()
    model.save_pretrained(tmp_path / "model")
    loaded = XCLlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    narrow = loaded.model.context_fingerprint()
    assert narrow != expected
    loaded.save_pretrained(tmp_path / "narrow")
    wide = XCLlamaForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32)
    assert wide.model.context_fingerprint() == narrow
    wide.encode_context(IDS)
    wide.generate(IDS, max_new_tokens=2, do_sample=False)
    assert wide.model.context_fingerprint() == narrow
    code = (
        "import sys; from modeling_xcllama import XCLlamaModel\n"
        "print(XCLlamaModel.from_pretrained(sys.argv[1]).context_fingerprint())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == expected


def test_inference_tensors(tiny_base, make_model):
    with torch.inference_mode():
        model = make_model(tiny_base)
        cache = model.encode_context(IDS)
        model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    assert refuses(model, cache)


def test_projected_contexts_of_trained_projections(tiny_model):
    projected = tiny_model.project_context(tiny_model.encode_context(IDS))
    tiny_model.generate(IDS, context_cache=projected, max_new_tokens=2)
    fused_steps(tiny_model, steps=1)
    for read in (tiny_model, tiny_model.generate):
        with pytest.raises(ValueError, match="have changed: call `project_context` again"):
            read(IDS, context_cache=projected)


def test_loading_added_weights_reads_little_of_the_base(make_llama, make_model, tmp_path, monkeypatch):
    model = make_model(make_llama(hidden_size=512, vocab_size=4000))
    model.save_cross_attention(tmp_path)
    read, sums = [], fingerprint._bit_sums
    monkeypatch.setattr(
        fingerprint, "_bit_sums", lambda tensor, dtype: read.append(tensor.numel()) or sums(tensor, dtype)
    )
    model.load_cross_attention(tmp_path)
    base = sum(weight.numel() for name, weight in model.named_parameters() if "cross" not in name)
    assert 0 < sum(read) < 0.2 * base


def test_meta_devices_are_named(tiny_model):
    cache = tiny_model.encode_context(IDS)
    with pytest.raises(ValueError, match="is on the meta device and holds no weights"):
        tiny_model.to("meta").project_context(cache)
