"""Encoders of real families: their configs in reduced depth and width, and MiniLM's real weights."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    LongformerConfig,
    ModernBertConfig,
    T5Config,
)

from modeling_xcllama import XCLlamaForCausalLM

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


def random_ids(*shape, seed=1):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def check_encoder(make_sharp_model, encoder, long: int):
    """States equal the encoder's own on unpadded input; long texts go in windows; trains, generates."""
    model = make_sharp_model(encoder=encoder)
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
def test_encoder_families(name, tmp_path, make_sharp_model):
    torch.manual_seed(0)
    model, cache = check_encoder(make_sharp_model, AutoModel.from_config(ENCODERS[name]).eval(), long=150)
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


def test_minilm_with_its_real_weights(minilm_folder, make_sharp_model):
    encoder = AutoModel.from_pretrained(minilm_folder, dtype=torch.float32).eval()
    model, cache = check_encoder(make_sharp_model, encoder, long=700)
    assert model.config.context_width == 384
    assert model.config.encoder_name_or_path == str(minilm_folder)
    assert AutoConfig.from_pretrained(minilm_folder).max_position_embeddings == 512
