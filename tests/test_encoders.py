"""Decoders and encoders of real families: their configs in reduced depth and width, and MiniLM's real weights."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    T5Config,
)

from dataset_builders.wheels import cache_folder
from modeling_xcllama import XCLlamaForCausalLM

# the published configs, with fewer layers and narrower: what is special about each is kept
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 97, "pad_token_id": 0}
DECODERS = {
    "Llama-2-7B": LlamaConfig(
        **SMALL,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=4,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "Llama-3.1-8B": LlamaConfig(
        **SMALL,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=4,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "Mistral-7B-v0.1": MistralConfig(
        **SMALL,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=4,
        max_position_embeddings=32768,
        sliding_window=12,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "TinyLlama-1.1B": LlamaConfig(
        **SMALL,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
NARROW = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ENCODERS = {
    "bert": BertConfig(**NARROW, vocab_size=97, max_position_embeddings=64),
    "longformer": LongformerConfig(
        **NARROW, vocab_size=97, max_position_embeddings=66, attention_window=8, pad_token_id=1
    ),
    "modernbert": ModernBertConfig(
        **NARROW,
        vocab_size=97,
        max_position_embeddings=64,
        local_attention=8,
        pad_token_id=0,
        attn_implementation="sdpa",
    ),
    "t5": T5Config(d_model=24, d_kv=12, d_ff=32, num_layers=2, num_heads=2, vocab_size=97, n_positions=64),
}


def sharpen(model):
    with torch.no_grad():
        for _, weight in model.added_parameters():
            if weight.dim() > 1:
                weight.mul_(10)
    return model.eval()


def random_ids(*shape, seed=1):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def build_base(config):
    torch.manual_seed(0)
    kind = MistralForCausalLM if config.model_type == "mistral" else LlamaForCausalLM
    base = kind(config).eval()
    with torch.no_grad():
        for weight in base.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    return base


@pytest.mark.parametrize("name", list(DECODERS))
def test_decoder_families(name, tmp_path):
    """Closed gates: the base's own logits, exactly, past every window; open ones: cached equals uncached, reloaded."""
    base = build_base(DECODERS[name])
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        expected = base(ids, attention_mask=mask).logits
        closed = XCLlamaForCausalLM.from_decoder(base, init="zero")
        cache = closed.encode_context(random_ids(2, 50, seed=2))
        got = closed(ids, attention_mask=mask, context_cache=cache).logits
    assert torch.equal(got, expected)
    assert torch.equal(closed(ids, attention_mask=mask).logits, expected)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(closed.generate(ids, context_cache=cache, **options), base.generate(ids, **options))

    model = sharpen(XCLlamaForCausalLM.from_decoder(base, cross_attention_gate=None, cross_attention_layers=[1, 3]))
    cache = model.encode_context(random_ids(2, 50, seed=2))
    with torch.no_grad():
        full = model(ids, context_cache=cache).logits
        # two thirds first, the rest from the key-value cache, one by one
        first = model(ids[:, :27], context_cache=cache, use_cache=True)
        steps, past = [first.logits], first.past_key_values
        for position in range(27, 40):
            step = model(ids[:, position : position + 1], context_cache=cache, past_key_values=past, use_cache=True)
            steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=2e-4, rtol=2e-4)
    assert (full - expected).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    again = XCLlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids, context_cache=cache).logits, full)


def test_mistrals_window_counts():
    """The comparison above could fail: without the window the logits past it are others."""
    config = DECODERS["Mistral-7B-v0.1"]
    base = build_base(config)
    ids = random_ids(1, 40)
    full = XCLlamaForCausalLM.from_decoder(base, init="zero", sliding_window=None)
    with torch.no_grad():
        difference = (full(ids).logits - base(ids).logits).abs().amax(-1)[0]
    assert difference[:12].max() < 1e-4
    assert difference[12:].min() > 1e-4


def test_encoding_sees_the_window_and_the_rope_scaling():
    """States of a context are those of the base's own layers."""
    for name in ("Llama-3.1-8B", "Mistral-7B-v0.1"):
        base = build_base(DECODERS[name])
        ids = random_ids(1, 40)
        for layer in (2, None):
            model = XCLlamaForCausalLM.from_decoder(base, context_layer=layer)
            cache = model.encode_context(ids)
            with torch.no_grad():
                expected = base.model(ids, output_hidden_states=True).hidden_states[-1 if layer is None else layer]
            torch.testing.assert_close(cache.states["hidden"], expected[0], atol=1e-5, rtol=1e-5)


def check_encoder(encoder, long: int):
    """States equal the encoder's own on unpadded input; long texts go in windows; trains, generates."""
    base = build_base(DECODERS["TinyLlama-1.1B"])
    model = XCLlamaForCausalLM.from_decoder(base, encoder=encoder, init="random", cross_attention_gate=None)
    sharpen(model)
    ids = random_ids(2, 21)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    cache = model.encode_context(ids, mask)
    assert cache.lengths == [21, 13]
    module = model.model.encoder
    with torch.no_grad():
        alone = module(input_ids=ids[1:, :13], attention_mask=torch.ones(1, 13).long()).last_hidden_state[0]
    torch.testing.assert_close(cache.states["hidden"][21:], alone, atol=1e-4, rtol=1e-3)
    assert model.encode_context(random_ids(1, long)).lengths == [long]
    prompts = random_ids(2, 5, seed=3)
    assert model.generate(prompts, context_cache=cache, max_new_tokens=5, do_sample=False).shape[1] > 5
    with torch.no_grad():
        logits, swapped = (model(prompts, context_cache=one).logits for one in (cache, cache.select([1, 0])))
    assert (logits - swapped).abs().max() > 1e-2
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any(name.startswith("model.encoder.") for name in trained)
    assert not any(name.startswith(("model.layers.", "lm_head.")) for name in trained)
    model(prompts, context_input_ids=ids, context_attention_mask=mask, labels=prompts).loss.backward()
    without = [n for n, w in model.model.encoder.named_parameters() if w.grad is None]
    # padding rows and unused global attention get none
    assert len(without) < len(list(model.model.encoder.parameters())) / 2
    return model, cache


@pytest.mark.parametrize("name", list(ENCODERS))
def test_encoder_families(name, tmp_path):
    torch.manual_seed(0)
    model, cache = check_encoder(AutoModel.from_config(ENCODERS[name]).eval(), long=150)
    cache.save(tmp_path / "cache.safetensors")
    model.save_pretrained(tmp_path)
    again = XCLlamaForCausalLM.from_pretrained(tmp_path).eval()
    loaded = again.load_context(tmp_path / "cache.safetensors")
    ids = random_ids(2, 5, seed=3)
    with torch.no_grad():
        first, second = model(ids, context_cache=cache).logits, again(ids, context_cache=loaded).logits
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(
        again.encode_context(random_ids(2, 21)).states, model.encode_context(random_ids(2, 21)).states
    )


def test_minilm_with_its_real_weights():
    folder = cache_folder() / "models" / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        pytest.skip("MiniLM is not there; run scripts/fetch_models.py")
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model, cache = check_encoder(encoder, long=700)
    assert model.config.context_width == 384
    assert model.config.encoder_name_or_path == str(folder)
    assert AutoConfig.from_pretrained(folder).max_position_embeddings == 512
