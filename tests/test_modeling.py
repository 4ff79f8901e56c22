import pytest
import torch
from torch import nn

from modeling_xcllama import ContextCache, XCLlamaConfig, XCLlamaForCausalLM
from modeling_xcllama.cross_attention import CROSS_ATTENTION_FUNCTIONS


def test_cached_logits_equal_uncached(variant_model, batch, tmp_path):
    uncached = variant_model(**batch).logits
    cache = variant_model.encode_context(batch["context_input_ids"], batch["context_attention_mask"])
    cache.save(tmp_path / "c")
    cached = variant_model(batch["input_ids"], context_cache=variant_model.load_context(tmp_path / "c")).logits
    torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=0)
    without = variant_model(batch["input_ids"]).logits
    assert (cached - without).abs().max() > 1e-2, "the context must change the logits"
    projected = variant_model.project_context(cache)
    torch.testing.assert_close(
        variant_model(batch["input_ids"], context_cache=projected).logits, uncached, atol=1e-5, rtol=0
    )


def test_padding_of_contexts_changes_nothing(variant_model, batch):
    ids, mask = batch["context_input_ids"], batch["context_attention_mask"]
    padded = variant_model.encode_context(ids, mask)
    left = variant_model.encode_context(ids.flip(1).roll(0, 1), mask.flip(1))
    alone = ContextCache.concat([variant_model.encode_context(ids[:1]), variant_model.encode_context(ids[1:, :6])])
    for name, states in padded.states.items():
        torch.testing.assert_close(states, alone.states[name], atol=1e-5, rtol=0)
        assert left.states[name].shape == states.shape
    assert padded.fingerprint == alone.fingerprint
    # an explicit mask of ones equals none
    whole = variant_model.encode_context(ids, torch.ones_like(ids))
    assert whole.token_ids.tolist() == variant_model.encode_context(ids).token_ids.tolist()


def test_closed_gates_give_the_base_model(tiny_base, batch, variants):
    expected = tiny_base(batch["input_ids"]).logits
    # joint mode has no gates
    for fields in (fields for fields in variants.values() if "cross_attention_mode" not in fields):
        fields = {"cross_attention_gate": "tanh"} | fields
        model = XCLlamaForCausalLM.from_decoder(tiny_base, init="zero", **fields)
        assert torch.equal(model(**batch).logits, expected)
    with pytest.raises(ValueError, match="init='zero' needs a gate"):
        XCLlamaForCausalLM.from_decoder(tiny_base, init="zero", cross_attention_gate=None)


def test_without_context_it_is_the_base_model(tiny_model, tiny_base, batch):
    assert torch.equal(tiny_model(batch["input_ids"]).logits, tiny_base(batch["input_ids"]).logits)


def test_warm_start_reads_the_decoders_own_keys_and_values(tiny_base, batch):
    model = XCLlamaForCausalLM.from_decoder(tiny_base, context_layer=2, cross_attention_layers=[1, 3])
    ids = batch["context_input_ids"][:1]
    layer = tiny_base.model.layers[2]
    states = layer.input_layernorm(tiny_base(ids, output_hidden_states=True).hidden_states[2][0])
    projected = model.project_context(model.encode_context(ids))
    # block after layer 1: what layer 2 would make of the same text, RoPE aside
    torch.testing.assert_close(projected.keys[0].flatten(1), layer.self_attn.k_proj(states))
    torch.testing.assert_close(projected.values[0].flatten(1), layer.self_attn.v_proj(states))
    blocks, layers = model.model.cross_attention_blocks, tiny_base.model.layers
    assert torch.equal(blocks[0].q_proj.weight, layers[2].self_attn.q_proj.weight)
    assert torch.equal(blocks[0].o_proj.weight, layers[2].self_attn.o_proj.weight)
    # the last layer has none after it
    assert torch.equal(blocks[1].q_proj.weight, layers[3].self_attn.q_proj.weight)
    merged = XCLlamaForCausalLM.from_decoder(tiny_base, cross_attention_num_key_value_heads=1)
    heads = layers[3].self_attn.k_proj.weight.view(2, 8, 32)
    torch.testing.assert_close(merged.model.context_projections[0].k_proj.weight, heads.mean(0))


def test_from_decoder_shares_and_freezes(tiny_base):
    model = XCLlamaForCausalLM.from_decoder(tiny_base)
    own = dict(model.named_parameters())
    for name, weight in tiny_base.named_parameters():
        assert own[name].data_ptr() == weight.data_ptr(), name
        assert not own[name].requires_grad
    assert all(weight.requires_grad for _, weight in model.added_parameters())
    assert {name for name, weight in own.items() if weight.requires_grad} == dict(model.added_parameters()).keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "copy"}, "'random', 'least_squares', got 'copy'"),
        ({"cross_attention_layer": [1]}, "no field cross_attention_layer"),
        ({"cross_attention_num_heads": 2}, "init='self_attention' needs the decoder's heads"),
        ({"cross_attention_num_heads": 6, "init": "random", "cross_attention_num_key_value_heads": 4}, "multiple"),
    ],
)
def test_from_decoder_refuses(tiny_base, arguments, message):
    with pytest.raises(ValueError, match=message):
        XCLlamaForCausalLM.from_decoder(tiny_base, **arguments)


def test_from_decoder_refuses_other_families():
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10))
    with pytest.raises(ValueError, match="type llama or mistral, got 'gpt2'"):
        XCLlamaForCausalLM.from_decoder(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_save_pretrained_is_exact(variant_model, batch, tmp_path, dtype):
    variant_model.save_pretrained(tmp_path)
    # not `.to(dtype)`, which would also round the frequencies of RoPE
    model = XCLlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    cache = model.encode_context(batch["context_input_ids"])
    model.save_pretrained(tmp_path)
    loaded = XCLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    for (name, ours), (other, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name
    # a cache made before saving is read after loading
    logits = model(batch["input_ids"], context_cache=cache).logits
    assert torch.equal(loaded(batch["input_ids"], context_cache=cache).logits, logits)
    assert {n for n, w in loaded.named_parameters() if w.requires_grad} == dict(loaded.added_parameters()).keys()


def test_missing_weights_are_initialized(tiny_base, tmp_path):
    """What a checkpoint lacks is initialized: no uninitialized memory is left in gates, norms and projections."""
    config = XCLlamaConfig(
        **{k: v for k, v in tiny_base.config.to_dict().items() if k in XCLlamaConfig.__dataclass_fields__}
    )
    tiny_base.save_pretrained(tmp_path)
    loaded = XCLlamaForCausalLM.from_pretrained(tmp_path, config=config)
    for block in loaded.model.cross_attention_blocks:
        assert block.gate.item() == config.cross_attention_gate_init
        assert torch.equal(block.input_norm.weight, torch.ones(32))
        assert 0 < block.q_proj.weight.std() < 0.1


def test_added_weights_round_trip(variant_model, tiny_base, batch, tmp_path):
    variant_model.save_cross_attention(tmp_path / "added")
    assert sorted(path.name for path in (tmp_path / "added").iterdir()) == [
        "config.json",
        "cross_attention.safetensors",
        "xcllama_classes.py",
    ]
    names = [name for name in XCLlamaConfig.__dataclass_fields__ if name.startswith("cross_attention_")]
    fields = {name: getattr(variant_model.config, name) for name in (*names, "context_layer", "context_prefix")}
    other = XCLlamaForCausalLM.from_decoder(tiny_base, init="random", **fields)
    other.load_cross_attention(tmp_path / "added")
    assert torch.equal(other(**batch).logits, variant_model(**batch).logits)


def test_added_weights_of_another_shape_are_refused(tiny_model, tiny_base, tmp_path, caplog):
    tiny_model.save_cross_attention(tmp_path)
    other = XCLlamaForCausalLM.from_decoder(tiny_base, cross_attention_layers=[1])
    with pytest.raises(ValueError, match=r"`cross_attention_layers`=\[2\], this model \[1\]"):
        other.load_cross_attention(tmp_path)
    with torch.no_grad():
        tiny_base.lm_head.weight.add_(1)
    same = XCLlamaForCausalLM.from_decoder(tiny_base)
    from transformers.utils import logging

    logging.enable_propagation()
    same.load_cross_attention(tmp_path)
    assert "trained on a decoder with other weights" in caplog.text


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_gradients_reach_the_added_weights_only(variant_model, batch, reentrant):
    variant_model.train()
    plain = variant_model(**batch, labels=batch["input_ids"])
    plain.loss.backward()
    expected = {
        name: weight.grad.clone() for name, weight in variant_model.named_parameters() if weight.grad is not None
    }
    assert expected.keys() == dict(variant_model.added_parameters()).keys()
    assert all(gradient.abs().sum() > 0 for name, gradient in expected.items() if "k_proj.bias" not in name)
    if reentrant is None:
        return
    variant_model.zero_grad()
    variant_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        variant_model.enable_input_require_grads()
    loss = variant_model(**batch, labels=batch["input_ids"], use_cache=False).loss
    torch.testing.assert_close(loss, plain.loss)
    loss.backward()
    for name, weight in variant_model.added_parameters():
        torch.testing.assert_close(weight.grad, expected[name], atol=1e-6, rtol=1e-5)


def test_autocast_trains(tiny_model, batch):
    tiny_model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiny_model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert all(weight.grad.isfinite().all() for _, weight in tiny_model.added_parameters())


def test_dropout_leaves_out_whole_tokens(tiny_base, batch, make_model):
    model = make_model(tiny_base, cross_attention_dropout=0.5)
    cache = model.encode_context(batch["context_input_ids"]).join([[0, 1], []])
    model.train()
    torch.manual_seed(0)
    projected = model.project_context(cache)
    kept = projected.rows.lengths[0]
    assert 1 <= kept < 22
    assert projected.keys[0].shape[0] == kept
    model.eval()
    assert model.project_context(cache).rows.lengths == [22, 0]


def test_rows_without_context_are_the_base_model(variant_model, tiny_base, batch):
    cache = variant_model.encode_context(batch["context_input_ids"])
    logits = variant_model(batch["input_ids"], context_cache=cache.join([[0], []])).logits
    expected = tiny_base(batch["input_ids"]).logits
    torch.testing.assert_close(logits[1], expected[1])
    assert (logits[0] - expected[0]).abs().max() > 1e-2


def test_joined_documents_equal_one_attention_over_both(variant_model, batch):
    cache = variant_model.encode_context(batch["context_input_ids"], batch["context_attention_mask"])
    rows = cache.join([[0, 1], [1, 0]])
    projected = variant_model.project_context(rows)
    assert projected.rows.lengths == [17, 17]
    parts = [variant_model.project_context(cache.select([index])) for index in (0, 1)]
    if not variant_model.config.cross_attention_rope:
        torch.testing.assert_close(projected.keys[0][:17], torch.cat([part.keys[0] for part in parts]))
        ids = batch["input_ids"][:1].expand(2, -1)
        logits = variant_model(ids, context_cache=rows).logits
        torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(projected.values[0][17:23], parts[1].values[0])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_backends_agree(tiny_base, batch, backend, monkeypatch, make_model):
    calls = []
    function = CROSS_ATTENTION_FUNCTIONS[backend]
    monkeypatch.setitem(CROSS_ATTENTION_FUNCTIONS, backend, lambda *inputs: calls.append(1) or function(*inputs))
    auto = make_model(tiny_base)
    chosen = make_model(tiny_base, cross_attn_implementation=backend)
    calls.clear()
    logits = chosen(**batch).logits
    assert calls, "the backend under test must run"
    torch.testing.assert_close(logits, auto(**batch).logits, atol=1e-5, rtol=0)


def test_self_attention_backend_is_independent(tiny_base, tmp_path, batch, make_model):
    make_model(tiny_base).save_pretrained(tmp_path)
    eager = XCLlamaForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", cross_attn_implementation="eager"
    )
    sdpa = XCLlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa", cross_attn_implementation="sdpa")
    torch.testing.assert_close(eager(**batch).logits, sdpa(**batch).logits, atol=1e-5, rtol=0)
    outputs = eager(**batch, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 4
    assert len(outputs.hidden_states) == 5
    (weights,) = outputs.cross_attentions
    assert weights.shape == (2, 4, 7, 11)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
    assert weights[1, :, :, 6:].abs().max() == 0


def test_tied_and_resized_embeddings(batch, tmp_path, make_llama):
    model = XCLlamaForCausalLM.from_decoder(make_llama(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.resize_token_embeddings(101)
    assert model(**batch).logits.shape[-1] == 101
    model.save_pretrained(tmp_path)
    loaded = XCLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_device_map_auto(tiny_model, batch, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = XCLlamaForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(loaded(**batch).logits, tiny_model(**batch).logits)


@pytest.mark.parametrize("layers", [None, 2], ids=["last", "middle"])
def test_encoding_stops_at_the_context_layer(tiny_base, batch, layers):
    model = XCLlamaForCausalLM.from_decoder(tiny_base, context_layer=layers)
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    cache = model.encode_context(batch["context_input_ids"])
    assert ran == list(range(4 if layers is None else layers))
    hidden_states = tiny_base(batch["context_input_ids"], output_hidden_states=True).hidden_states
    expected = hidden_states[-1 if layers is None else layers]
    torch.testing.assert_close(cache.states["hidden"], expected.flatten(0, 1), atol=1e-6, rtol=0)


def test_long_contexts_are_encoded_in_windows(tiny_model):
    ids = torch.randint(3, 97, (1, 600))
    cache = tiny_model.encode_context(ids)
    parts = [tiny_model.encode_context(ids[:, start : start + 200]) for start in (0, 200, 400)]
    expected = torch.cat([part.states["hidden"] for part in parts])
    torch.testing.assert_close(cache.states["hidden"], expected, atol=1e-5, rtol=0)


def test_cache_of_another_model_is_refused(tiny_model, tiny_base, batch, make_llama):
    cache = tiny_model.encode_context(batch["context_input_ids"])
    other = XCLlamaForCausalLM.from_decoder(make_llama(rms_norm_eps=1e-3))
    with pytest.raises(ValueError, match=f"{cache.fingerprint}, the model's {other.model.context_fingerprint()}"):
        other(batch["input_ids"], context_cache=cache)
    template = XCLlamaForCausalLM.from_decoder(tiny_base, template_version="0")
    with pytest.raises(ValueError, match="another model, template"):
        template.generate(batch["input_ids"], context_cache=cache)
    condensed = XCLlamaForCausalLM.from_decoder(tiny_base, cross_attention_share_key_value=True)
    with pytest.raises(ValueError, match="layout 'hidden', the model reads 'condensed'"):
        condensed(batch["input_ids"], context_cache=cache)
    narrow = ContextCache(
        {"hidden": cache.states["hidden"][:, :16]}, cache.offsets, cache.token_ids, cache.fingerprint
    )
    with pytest.raises(ValueError, match=r"shape \(16,\) a token, the model reads \(32,\)"):
        tiny_model(batch["input_ids"], context_cache=narrow)


def test_fingerprint_follows_training(tiny_base, batch):
    model = XCLlamaForCausalLM.from_decoder(tiny_base, cross_attention_share_key_value=True)
    before = model.encode_context(batch["context_input_ids"])
    with torch.no_grad():
        model.model.context_projections[0].k_proj.weight.add_(0.1)
    with pytest.raises(ValueError, match="another model"):
        model(batch["input_ids"], context_cache=before)
    # the hidden layout does not depend on the projections
    hidden = XCLlamaForCausalLM.from_decoder(tiny_base)
    cache = hidden.encode_context(batch["context_input_ids"])
    with torch.no_grad():
        hidden.model.context_projections[0].k_proj.weight.add_(0.1)
    hidden(batch["input_ids"], context_cache=cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda cache, ids: {"context_cache": cache.select([0])}, "1 rows and the batch 2"),
        (lambda cache, ids: {"context_cache": cache, "context_input_ids": ids}, "not both"),
        (lambda cache, ids: {"context_input_ids": ids[:0]}, "at least one context"),
        (lambda cache, ids: {"context_input_ids": ids, "context_attention_mask": ids[:, :3]}, "must have the shape"),
    ],
)
def test_contexts_that_do_not_fit(tiny_model, batch, arguments, message):
    cache = tiny_model.encode_context(batch["context_input_ids"])
    for call in (tiny_model, tiny_model.generate):
        with pytest.raises(ValueError, match=message):
            call(input_ids=batch["input_ids"], **arguments(cache, batch["context_input_ids"]))


def test_an_empty_context_is_a_row_without_one(tiny_model, tiny_base, batch):
    mask = torch.ones_like(batch["context_input_ids"])
    mask[1] = 0
    cache = tiny_model.encode_context(batch["context_input_ids"], mask)
    assert cache.lengths == [11, 0]
    logits = tiny_model(batch["input_ids"], context_cache=cache).logits
    assert torch.equal(logits[1], tiny_base(batch["input_ids"]).logits[1])
    assert tiny_model.encode_context(batch["context_input_ids"], torch.zeros_like(mask)).lengths == [0, 0]


def test_limits_of_contexts(tiny_base, batch):
    model = XCLlamaForCausalLM.from_decoder(tiny_base, context_max_length=8)
    with pytest.raises(ValueError, match="11 tokens, `context_max_length` is 8"):
        model.encode_context(batch["context_input_ids"])
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.encode_context(torch.tensor([[5, 6]]))


def test_compiled_forward_equals_eager(tiny_model, batch):
    cache = tiny_model.encode_context(batch["context_input_ids"])
    projected = tiny_model.project_context(cache)
    compiled = torch.compile(tiny_model, backend="aot_eager")
    logits = compiled(batch["input_ids"], context_cache=projected, use_cache=False).logits
    torch.testing.assert_close(
        logits, tiny_model(batch["input_ids"], context_cache=projected).logits, atol=1e-5, rtol=0
    )


def test_original_block_has_no_gate(tiny_base):
    model = XCLlamaForCausalLM.from_decoder(tiny_base, cross_attention_gate=None, cross_attention_intermediate_size=16)
    block = model.model.cross_attention_blocks[0]
    assert block.gate is None
    assert block.mlp_gate is None
    assert isinstance(block.mlp.up_proj, nn.Linear)
