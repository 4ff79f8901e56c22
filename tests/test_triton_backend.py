"""`cross_attn_implementation="triton"` in the model, under Triton's interpreter."""

import importlib.util
import sys

import pytest
import torch

from modeling_xcllama import XCLlamaForCausalLM, cross_attention

launch = pytest.importorskip("xcllama_kernels.launch", reason="the kernels need triton")
if not launch.INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

FIELDS = {
    "hidden": {"cross_attention_head_dim": 16, "cross_attention_layers": [1, 3]},
    "condensed": {"cross_attention_head_dim": 16, "cross_attention_share_key_value": True},
}


@pytest.fixture(params=FIELDS.values(), ids=FIELDS.keys())
def models(request, tiny_base, make_model):
    options = request.param | {"init": "random"}
    triton = make_model(tiny_base, **options, cross_attn_implementation="triton")
    return triton, make_model(tiny_base, **options, cross_attn_implementation="sdpa")


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_generate_equals_sdpa(models, batch, dtype):
    triton, sdpa = models
    cache = sdpa.encode_context(batch["context_input_ids"], batch["context_attention_mask"]).join([[0], [1, 0]])
    cache = cache if dtype is None else cache.quantize(dtype)
    launch.launch_counts.clear()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    generated = triton.generate(batch["input_ids"], context_cache=cache, **options)
    assert launch.launch_counts["decode_kernel"] > 0, "the kernels must run"
    fused = cache.is_quantized and cache.layout == "hidden"
    assert launch.launch_counts["project_kernel"] == (2 * 2 if fused else 0)
    assert torch.equal(generated, sdpa.generate(batch["input_ids"], context_cache=cache, **options))
    ours = triton(batch["input_ids"], context_cache=cache).logits
    torch.testing.assert_close(ours, sdpa(batch["input_ids"], context_cache=cache).logits, atol=1e-4, rtol=0)


def test_training_equals_sdpa(models, batch):
    gradients = []
    launch.launch_counts.clear()
    for model in models:
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.added_parameters()})
    assert launch.launch_counts["context_gradient_kernel"] > 0, "the kernels must run"
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-5, rtol=1e-4)


def test_the_shape_of_the_offsets_is_checked_once(models, batch):
    rows = models[0].project_context(models[0].encode_context(batch["context_input_ids"])).rows
    first, second = rows.tensors(torch.device("cpu")), rows.tensors(torch.device("cpu"))
    assert first[0] is second[0]
    assert first[1] is second[1]


@pytest.mark.parametrize("named", [True, False], ids=["hub-kernel", "installed"])
def test_without_triton_an_explicit_choice_raises_and_auto_says_what_it_takes(tiny_base, monkeypatch, named):
    monkeypatch.setattr(cross_attention, "_kernels", [])
    found = importlib.util.find_spec
    monkeypatch.setattr(
        cross_attention.importlib.util, "find_spec", lambda name: None if name == "triton" else found(name)
    )
    if named:
        monkeypatch.setenv("XCLLAMA_KERNEL", "someone/other-kernels")
    with pytest.raises(ImportError, match="needs triton: `pip install triton "):
        XCLlamaForCausalLM.from_decoder(tiny_base, cross_attn_implementation="triton")
    warnings = []
    monkeypatch.setattr(cross_attention.logger, "warning_once", warnings.append)
    assert cross_attention.resolve_implementation("auto", torch.device("cpu")) == "sdpa"
    assert warnings == []
    assert cross_attention.resolve_implementation("auto", torch.device("cuda")) == "sdpa"
    assert "takes 'sdpa' on this GPU" in warnings[0]
    assert "pip install triton" in warnings[0]


def test_auto_says_what_it_takes_on_a_cpu(tiny_base, monkeypatch):
    said = []
    monkeypatch.setattr(cross_attention.logger, "info", said.append)
    XCLlamaForCausalLM.from_decoder(tiny_base, cross_attn_implementation="auto")
    assert said == ["cross_attn_implementation='auto' takes 'sdpa' on cpu"]


def test_the_environment_overrides_the_installed_package(monkeypatch, tmp_path):
    """A Hub kernel that the environment names comes before the installed package."""
    import kernels

    asked = []
    monkeypatch.setattr(cross_attention, "_kernels", [])
    monkeypatch.setattr(kernels, "get_kernel", lambda name, **options: asked.append((name, options)) or sys)
    monkeypatch.setenv("XCLLAMA_KERNEL", "someone/other-kernels")
    assert cross_attention.find_kernels() is sys
    assert cross_attention.find_kernels() is sys
    assert asked == [("someone/other-kernels", {"version": 1, "trust_remote_code": True})]
