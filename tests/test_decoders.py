"""Decoders of real families, by their published configs: narrow in every detail, and at full width in two layers."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_xcllama import XCLlamaForCausalLM

# config.json of each on the Hub, without what the number of layers and the weights' type say; compared with copies
# in public repositories on 2026-11-25
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "meta-llama/Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
NARROW = {"hidden_size": 64, "head_dim": 4, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 97}
NARROW |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MISTRAL = "mistralai/Mistral-7B-v0.1"


def random_ids(*shape, seed=1):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def build_base(name, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**(PUBLISHED[name] | fields))
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def build_narrow(name):
    """The published config, narrower and with four layers; a window that short texts pass."""
    base = build_base(name, **NARROW, **({"sliding_window": 12} if name == MISTRAL else {}))
    scale(base.parameters(), 3)
    return base


def scale(weights, factor):
    with torch.no_grad():
        for weight in weights:
            if weight.dim() > 1:
                weight.mul_(factor)


def open_model(base, factor, **fields):
    """Ungated blocks that change the logits."""
    model = XCLlamaForCausalLM.from_decoder(base, cross_attention_gate=None, **fields)
    scale((weight for _, weight in model.added_parameters()), factor)
    return model.eval()


def check_closed(base, ids, mask, contexts, new_tokens):
    """Closed gates: the base's own logits and tokens, exactly."""
    closed = XCLlamaForCausalLM.from_decoder(base, init="zero")
    with torch.no_grad():
        expected = base(ids, attention_mask=mask).logits
        cache = closed.encode_context(contexts)
        assert torch.equal(closed(ids, attention_mask=mask, context_cache=cache).logits, expected)
        assert torch.equal(closed(ids, attention_mask=mask).logits, expected)
    options = {"attention_mask": mask, "max_new_tokens": new_tokens, "do_sample": False}
    assert torch.equal(closed.generate(ids, context_cache=cache, **options), base.generate(ids, **options))
    return expected


@torch.no_grad()
def stepwise(model, ids, cache, first):
    """Logits of `ids`, `first` tokens at once and the rest from the key-value cache, one by one."""
    step = model(ids[:, :first], context_cache=cache, use_cache=True)
    logits = [step.logits]
    for position in range(first, ids.shape[1]):
        token = ids[:, position : position + 1]
        step = model(token, context_cache=cache, past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_narrow(name, tmp_path):
    """Closed gates: the base, past every window; open ones: cached equals uncached, and reloaded."""
    base = build_narrow(name)
    ids, contexts = random_ids(2, 40), random_ids(2, 50, seed=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    expected = check_closed(base, ids, mask, contexts, new_tokens=6)

    model = open_model(base, 10, cross_attention_layers=[1, 3])
    cache = model.encode_context(contexts)
    with torch.no_grad():
        full = model(ids, context_cache=cache).logits
    torch.testing.assert_close(stepwise(model, ids, cache, 27), full, atol=2e-4, rtol=2e-4)
    assert (full - expected).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    again = XCLlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids, context_cache=cache).logits, full)


def test_mistrals_window_counts():
    """The comparison above could fail: without the window the logits past it are others."""
    base = build_narrow(MISTRAL)
    ids = random_ids(1, 40)
    full = XCLlamaForCausalLM.from_decoder(base, init="zero", sliding_window=None)
    with torch.no_grad():
        difference = (full(ids).logits - base(ids).logits).abs().amax(-1)[0]
    assert difference[:12].max() < 1e-4
    assert difference[12:].min() > 1e-4


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", MISTRAL])
def test_encoding_sees_the_window_and_the_rope_scaling(name):
    """States of a context are those of the base's own layers."""
    base = build_narrow(name)
    ids = random_ids(1, 40)
    for layer in (2, None):
        model = XCLlamaForCausalLM.from_decoder(base, context_layer=layer)
        cache = model.encode_context(ids)
        with torch.no_grad():
            expected = base.model(ids, output_hidden_states=True).hidden_states[-1 if layer is None else layer]
        torch.testing.assert_close(cache.states["hidden"], expected[0], atol=1e-5, rtol=1e-5)


def test_llama_3s_rope_scaling():
    """The frequencies of the published scaling: the high ones as they are, the low ones an eighth."""
    base = build_base("meta-llama/Llama-3.1-8B", **NARROW | {"head_dim": 128})
    frequencies = XCLlamaForCausalLM.from_decoder(base).model.rotary_emb.inv_freq
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    wavelengths = 2 * torch.pi / plain
    high, low = wavelengths < 8192 / 4, wavelengths > 8192
    assert high.any()
    assert low.any()
    torch.testing.assert_close(frequencies[high], plain[high])
    torch.testing.assert_close(frequencies[low], plain[low] / 8)
    between = frequencies[~(high | low)] / plain[~(high | low)]
    assert ((between < 1) & (between > 1 / 8)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_full_width(name):
    """Every published size but the number of layers, in bfloat16: at most 4 GB of weights."""
    base = build_base(name, torch.bfloat16, num_hidden_layers=2)
    for field, value in PUBLISHED[name].items():
        # rope_theta and rope_scaling are one field in transformers 5
        if not field.startswith("rope"):
            assert getattr(base.config, field) == value
    ids, contexts = random_ids(1, 9), random_ids(1, 33, seed=2)
    expected = check_closed(base, ids, torch.ones_like(ids), contexts, new_tokens=3)

    model = open_model(base, 3, cross_attention_layers=[0, 1])
    cache = model.encode_context(contexts)
    # the paper's sizes: one state of the decoder's width a token
    assert cache.bytes_per_token == 2 * base.config.hidden_size
    with torch.no_grad():
        full = model(ids, context_cache=cache).logits
    assert (full - expected).float().norm() > 0.1 * expected.float().norm()
    difference = stepwise(model, ids, cache, 6) - full
    # bfloat16 has eight bits
    assert difference.float().norm() < 0.02 * full.float().norm()


@pytest.mark.slow
def test_mistrals_window_of_4096():
    """Encoding a text longer than the window at full width: the base's states, which the window shapes."""
    base = build_base(MISTRAL, torch.bfloat16, num_hidden_layers=1)
    ids = random_ids(1, 4096 + 40)
    cache = XCLlamaForCausalLM.from_decoder(base).encode_context(ids)
    with torch.no_grad():
        states = base.model(ids).last_hidden_state[0]
        base.config.sliding_window = None
        unlimited = base.model(ids).last_hidden_state[0]
    torch.testing.assert_close(cache.states["hidden"], states, atol=1e-2, rtol=1e-2)
    different = (unlimited != states).any(-1)
    assert different[4096:].all()
    assert not different[:4096].any()
