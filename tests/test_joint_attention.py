"""Joint reading: one softmax over context and own tokens, with the decoder's own prompt as its oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_xcllama import XCLlamaForCausalLM, cross_attention
from modeling_xcllama.context_cache import ProjectedContext
from modeling_xcllama.context_projection import ReadingPlan
from modeling_xcllama.decoding_speed import decoding_compile_config

PREFIX = [5, 9]
JOINT = {"cross_attention_mode": "joint", "context_layer": [1, 3], "context_prefix": PREFIX}
VARIANTS = {
    "all": {},
    "few": {"cross_attention_layers": [1, 2]},
    "adapter": {"cross_attention_adapter_rank": 2},
    "condensed": {"cross_attention_share_key_value": True},
    "one_state": {"context_layer": 3, "context_prefix": None},
}


def joint_model(make_sharp_llama, **fields) -> XCLlamaForCausalLM:
    """A random joint model in which every context shows."""
    torch.manual_seed(0)
    model = XCLlamaForCausalLM.from_decoder(make_sharp_llama(head_dim=16), init="random", **(JOINT | fields))
    with torch.no_grad():
        for name, weight in model.added_parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3 if "projections" in name else 0.1)
    return model


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request, make_sharp_llama) -> XCLlamaForCausalLM:
    return joint_model(make_sharp_llama, **request.param)


def ids(count: int, seed: int = 3) -> list[int]:
    return torch.randint(10, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def question(rows: int = 2, length: int = 7) -> torch.Tensor:
    """Rows that start with the prefix, as every prompt does."""
    rest = torch.randint(10, 97, (rows, length), generator=torch.Generator().manual_seed(4))
    return torch.cat([torch.tensor([PREFIX]).expand(rows, -1), rest], dim=1)


def exact_context(model: XCLlamaForCausalLM, document: list[int]) -> ProjectedContext:
    """The decoder's own keys and values of a document that stands behind the prefix."""
    past = model(torch.tensor([PREFIX + document]), use_cache=True).past_key_values
    pairs = [(layer.keys, layer.values) for layer in past.layers]
    keys, values = (
        [part[0, :, len(PREFIX) :].transpose(0, 1) for part in parts] for parts in zip(*pairs, strict=True)
    )
    plan = ReadingPlan.of((0, len(document)), [(0,)])
    implementation = model.config.cross_attn_implementation
    implementation = "sdpa" if implementation == "auto" else implementation
    return ProjectedContext(
        tuple(keys), tuple(values), plan.rows, None, model.model.context_projections, implementation
    )


@pytest.mark.parametrize("cross_attn_implementation", ["eager", "sdpa", "triton"])
def test_exact_keys_and_values_give_the_logits_of_the_prompt(make_sharp_llama, cross_attn_implementation):
    model = joint_model(make_sharp_llama, cross_attn_implementation=cross_attn_implementation)
    document, rest = ids(23), question(1)
    prompt = torch.cat([torch.tensor([PREFIX + document]), rest[:, len(PREFIX) :]], dim=1)
    wanted = model(prompt).logits[:, len(PREFIX) + len(document) :]
    given_logits = model(rest, context_cache=exact_context(model, document)).logits[:, len(PREFIX) :]
    torch.testing.assert_close(given_logits, wanted, atol=1e-4, rtol=1e-4)
    # the prefix does not see what follows it
    torch.testing.assert_close(
        model(rest, context_cache=exact_context(model, document)).logits[:, : len(PREFIX)],
        model(prompt).logits[:, : len(PREFIX)],
        atol=1e-4,
        rtol=1e-4,
    )


def test_least_squares_read_the_prompt_of_a_decoder_whose_states_are_kept(make_llama):
    """With the states of every layer cached, the maps are exact: an untrained model reads its prompt."""
    base = make_llama()
    fields = JOINT | {"context_layer": [0, 1, 2, 3]}
    texts = [ids(40, seed) for seed in range(60)]
    model = XCLlamaForCausalLM.from_decoder(base, init="least_squares", texts=texts, **fields).eval()
    document, rest = ids(30, 99), question(1)
    cache = model.encode_context(torch.tensor([document]))
    prompt = torch.cat([torch.tensor([PREFIX + document]), rest[:, len(PREFIX) :]], dim=1)
    wanted = base(prompt).logits[:, -1]
    without = (model(rest).logits[:, -1] - wanted).abs().max()
    near = (model(rest, context_cache=cache).logits[:, -1] - wanted).abs().max()
    assert near < 0.1 * without


def test_cached_equals_uncached_and_step_by_step(model):
    document, text = torch.tensor([ids(11), ids(11, 8)]), question()
    cache = model.encode_context(document)
    whole = model(text, context_cache=cache).logits
    torch.testing.assert_close(model(text, context_input_ids=document).logits, whole)
    past, steps = None, []
    for position in range(text.shape[1]):
        output = model(text[:, position : position + 1], past_key_values=past, use_cache=True, context_cache=cache)
        past = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


def test_rows_without_a_context_are_the_base_models(model, make_sharp_llama):
    cache, text = model.encode_context(torch.tensor([ids(11)])), question(3)
    logits = model(text, context_cache=cache.join([[0], [], [0]])).logits
    base = make_sharp_llama(head_dim=16)(text).logits
    torch.testing.assert_close(logits[1], base[1], atol=1e-4, rtol=1e-4)
    assert (logits[0] - base[0]).abs().max() > 1e-2
    torch.testing.assert_close(model(text).logits, base)
    torch.testing.assert_close(model(text, context_cache=cache.join([[]] * 3)).logits, base, atol=1e-4, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(3)), lengths=st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_joined_documents_have_no_order(make_sharp_llama, order, lengths):
    model = joint_model(make_sharp_llama)
    text = question(1)
    documents = [model.encode_context(torch.tensor([ids(n, n)])) for n in lengths]
    cache = documents[0].concat(documents)
    wanted = model(text, context_cache=cache.join([[0, 1, 2]])).logits
    torch.testing.assert_close(model(text, context_cache=cache.join([order])).logits, wanted, atol=1e-4, rtol=1e-4)


def test_left_padding_changes_nothing(model):
    cache = model.encode_context(torch.tensor([ids(11)]))
    text = question(1)
    wanted = model(text, context_cache=cache).logits
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), text], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions, context_cache=cache).logits[:, 3:]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_equals_argmax_of_forward_and_shares_contexts(model, options):
    cache, text = model.encode_context(torch.tensor([ids(11)])), question(2)
    written = model.generate(text, context_cache=cache.select([0, 0]), max_new_tokens=5, do_sample=False, **options)
    assert written.shape == (2 * options.get("num_return_sequences", 1), text.shape[1] + 5)
    if not options:
        row = text
        for _ in range(5):
            step = model(row, context_cache=cache.select([0, 0])).logits[:, -1].argmax(-1, keepdim=True)
            row = torch.cat([row, step], dim=1)
        assert torch.equal(written, row)


def test_compiled_steps_over_a_static_cache_write_the_same(model):
    cache, text = model.encode_context(torch.tensor([ids(11), ids(11, 8)])).join([[0, 1], [1]]), question(2)
    options = {"context_cache": cache, "max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(text, **options)
    assert torch.equal(model.generate(text, cache_implementation="static", **options), wanted)
    compiled = decoding_compile_config(backend="eager")
    assert torch.equal(model.generate(text, cache_implementation="static", compile_config=compiled, **options), wanted)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_caches_are_near(model, dtype):
    cache, text = model.encode_context(torch.tensor([ids(11)])), question(1)
    wanted = model(text, context_cache=cache).logits
    near = model(text, context_cache=cache.quantize(dtype)).logits
    without = (model(text).logits - wanted).abs().mean()
    assert 0 < (near - wanted).abs().mean() < without


def test_gradients_reach_the_added_weights_alone(model):
    model.train()
    model(question(1), context_input_ids=torch.tensor([ids(11)]), labels=question(1)).loss.backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert reached == {name for name, _ in model.added_parameters()}


def test_attention_weights_cover_the_context(model):
    cache, text = model.encode_context(torch.tensor([ids(11)])), question(1)
    outputs = model(text, context_cache=cache, output_attentions=True)
    assert len(outputs.cross_attentions) == len(model.config.cross_attention_layers)
    sums = outputs.cross_attentions[0].sum(-1)
    # a part of the one softmax; nothing for the prefix
    assert (sums[:, :, : len(model.config.context_prefix or ())] == 0).all()
    assert ((sums >= 0) & (sums < 1 + 1e-5)).all()
    sequences = model.generate(text, context_cache=cache, max_new_tokens=3)
    weights = model.context_weights(sequences, cache, prompt_length=text.shape[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(1))


def test_saved_weights_load_into_another_model(model, make_sharp_llama, tmp_path):
    model.save_cross_attention(tmp_path)
    fields = {name: value for name, value in model.config.to_dict().items() if name.startswith(("cross_", "context_"))}
    fields.pop("context_fingerprint"), fields.pop("context_max_length")
    other = XCLlamaForCausalLM.from_decoder(make_sharp_llama(head_dim=16), init="random", **fields)
    other.load_cross_attention(tmp_path)
    cache, text = model.encode_context(torch.tensor([ids(11)])), question(1)
    torch.testing.assert_close(other(text, context_cache=cache).logits, model(text, context_cache=cache).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cross_attention_rope": True}, "cross_attention_rope"),
        ({"cross_attention_num_heads": 2}, "cross_attention_num_heads"),
        ({"cross_attention_gate": "tanh"}, "cross_attention_gate"),
        ({"context_layer": [3, 1]}, "increasing"),
        ({"context_prefix": [97]}, "token ids below 97"),
        ({"cross_attention_adapter_rank": 0}, "positive"),
        ({"cross_attention_mode": "block", "cross_attention_adapter_rank": 2}, "needs joint mode"),
        ({"cross_attention_mode": "both"}, "one of 'block', 'joint'"),
    ],
)
def test_wrong_fields_are_refused(tiny_base, fields, message):
    with pytest.raises(ValueError, match=message):
        XCLlamaForCausalLM.from_decoder(tiny_base, init="random", **(JOINT | fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7])
def test_flash_attention_is_what_plain_products_are(model, length, dtype, monkeypatch):
    ran, flash = [], cross_attention._attend_flash
    monkeypatch.setattr(cross_attention, "_attend_flash", lambda *inputs: ran.append(1) or flash(*inputs))
    monkeypatch.setattr(cross_attention, "has_native_products", lambda dtype: False)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, length, 4, 16, generator=generator).to(dtype)
    # channel by channel, too: flash attention takes a head for contiguous
    key, value = (torch.randn(2, 16, 50, generator=generator).permute(2, 0, 1).to(dtype) for _ in range(2))
    arguments = query, key, value, cross_attention.ContextRows((0, 20, 50), (1, 0)), 0.25
    with torch.no_grad():
        found = cross_attention.cross_attention_with_lse(*arguments, "sdpa")
        wanted = cross_attention.cross_attention_with_lse(*arguments, "eager")
    assert len(ran) == 2
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
