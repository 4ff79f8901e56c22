"""A context reaches the model or is refused: no public way of calling the model drops it."""

import pytest
import torch
from transformers import GenerationConfig

from modeling_xcllama import ContextCache, XCLlamaForCausalLM, XCLlamaModel
from modeling_xcllama.added_modules import keep_added_modules

IDS = torch.arange(3, 10)[None]


@pytest.fixture
def cache(tiny_model) -> ContextCache:
    return tiny_model.encode_context(torch.arange(20, 31)[None])


def contexts(cache: ContextCache) -> dict[str, object]:
    return {
        "context_cache": cache,
        "context_input_ids": IDS,
        "context_attention_mask": torch.ones_like(IDS),
        "context_lookup_num_tokens": 3,
        "assistant_context_cache": cache,
    }


@pytest.mark.parametrize("name", contexts(None))
def test_continuous_batching_reads_none(tiny_model, cache, name):
    argument = {name: contexts(cache)[name]}
    with pytest.raises(ValueError, match=f"read no contexts, got `{name}`: pass it to `generate`"):
        tiny_model.generate_batch(IDS.tolist(), max_new_tokens=2, **argument)
    config = GenerationConfig(**argument)
    for call in (tiny_model.generate_batch, tiny_model.init_continuous_batching, tiny_model.generate):
        inputs = {tiny_model.generate_batch: {"inputs": IDS.tolist()}, tiny_model.generate: {"inputs": IDS}}.get(
            call, {}
        )
        with pytest.raises(ValueError, match=f"carries no contexts, got `{name}`"):
            call(**inputs, generation_config=config)
    with (
        pytest.raises(ValueError, match="carries no contexts"),
        tiny_model.continuous_batching_context_manager(config),
    ):
        pass
    tiny_model.generation_config.update(**argument)
    tiny_model.generation_config.__dict__ |= argument
    with pytest.raises(ValueError, match="carries no contexts"):
        tiny_model.generate(IDS)


def test_paged_caches_read_none(tiny_model, cache):
    with pytest.raises(ValueError, match="read no contexts, got `context_cache`"):
        tiny_model.generate(IDS, context_cache=cache, cache_implementation="paged", max_new_tokens=2)


@pytest.mark.parametrize("method", ["forward", "generate", "bare"])
def test_masks_belong_to_ids(tiny_model, cache, method):
    call = tiny_model.model if method == "bare" else getattr(tiny_model, method)
    mask = torch.ones_like(IDS)
    for arguments in ({"context_cache": cache}, {}):
        with pytest.raises(ValueError, match="`context_attention_mask` belongs to `context_input_ids`"):
            call(IDS, context_attention_mask=mask, **arguments)
    with pytest.raises(ValueError, match="not both"):
        call(IDS, context_cache=cache, context_input_ids=IDS)


@pytest.mark.parametrize(
    "wrong", ["docs.safetensors", 7, {"hidden": torch.zeros(1, 32)}, [1], torch.zeros(3)], ids=str
)
def test_what_is_no_cache(tiny_model, wrong):
    for call in (tiny_model, tiny_model.model, tiny_model.generate):
        with pytest.raises(TypeError, match=r"got \w+; open a file with `model.load_context\(path\)`"):
            call(IDS, context_cache=wrong)


def test_unknown_arguments(tiny_model, cache):
    for call in (tiny_model, tiny_model.model):
        with pytest.raises(TypeError, match="no argument `context_caches`"):
            call(IDS, context_caches=cache)
        with pytest.raises(TypeError, match="no argument `contexts`"):
            call(IDS, contexts=cache)
    with pytest.raises(ValueError, match="context_caches"):
        tiny_model.generate(IDS, context_caches=cache)


def test_custom_generation_gets_the_context(tiny_model, cache):
    seen = []

    def custom(model, input_ids, generation_config=None, **kwargs):
        seen.append(model(input_ids, context_cache=kwargs["context_cache"]).logits)
        return input_ids

    tiny_model.generate(IDS, context_cache=cache, custom_generate=custom)
    torch.testing.assert_close(seen[0], tiny_model(IDS, context_cache=cache).logits)


def test_meta_devices(tiny_base):
    model = XCLlamaForCausalLM.from_decoder(tiny_base)
    cache = model.encode_context(IDS)
    model.to("meta")
    for call in (
        lambda: model.encode_context(IDS),
        lambda: model.project_context(cache),
        lambda: model(IDS, context_cache=cache),
        lambda: model.generate(IDS, context_input_ids=IDS),
    ):
        with pytest.raises(ValueError, match="on the meta device and holds no"):
            call()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_added_modules_read_contexts(tiny_model, cache):
    with torch.no_grad():
        exact = tiny_model(IDS, context_cache=cache).logits
    quantized = torch.ao.quantization.quantize_dynamic(tiny_model, {torch.nn.Linear}, dtype=torch.qint8)
    own = quantized.encode_context(torch.arange(20, 31)[None])
    assert own.fingerprint != cache.fingerprint
    with torch.no_grad():
        logits = quantized(IDS, context_cache=own).logits
        plain = quantized(IDS).logits
    assert (logits - exact).norm() < 0.1 * exact.norm()
    assert (logits - plain).norm() > 0.1 * exact.norm()
    with pytest.raises(ValueError, match="made by another model"):
        quantized(IDS, context_cache=cache)
    # what torch packed away counts, too
    other = torch.ao.quantization.quantize_dynamic(
        XCLlamaForCausalLM(tiny_model.config).eval(), {torch.nn.Linear}, dtype=torch.qint8
    )
    other.model.embed_tokens.load_state_dict(tiny_model.model.embed_tokens.state_dict())
    assert other.model.context_fingerprint() != own.fingerprint


def test_the_bare_model_keeps_its_added_modules(tiny_model, tmp_path, monkeypatch):
    """`AutoModel` with a `quantization_config` leaves them whole, as `AutoModelForCausalLM` does."""
    tiny_model.save_pretrained(tmp_path)
    seen = []
    monkeypatch.setattr(
        "modeling_xcllama.decoder_xcllama.keep_added_modules",
        lambda config: seen.append(keep_added_modules(config).llm_int8_skip_modules),
    )
    XCLlamaModel.from_pretrained(tmp_path, quantization_config={"load_in_8bit": True})
    assert "context_projections" in seen[0]
