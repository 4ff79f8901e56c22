"""Context-lookup decoding: the same tokens as plain greedy decoding, in fewer passes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_xcllama.context_lookup import ContextLookup


def plain(model, prompt, cache, **options):
    return model.generate(prompt, context_cache=cache, do_sample=False, **options)


def looked_up(model, prompt, cache, num_tokens=6, **options):
    output = plain(model, prompt, cache, context_lookup_num_tokens=num_tokens, return_dict_in_generate=True, **options)
    return output.sequences, output.context_lookup


@pytest.fixture
def quoting(tiny_model, batch):
    """A model, a prompt and a context that holds the model's own answer: closed gates keep it the same."""
    prompt = batch["input_ids"][:1]
    with torch.no_grad():
        for block in tiny_model.model.cross_attention_blocks:
            block.gate.zero_()
    context = batch["context_input_ids"][:1]
    answer = plain(tiny_model, prompt, tiny_model.encode_context(context), max_new_tokens=40, eos_token_id=None)
    return tiny_model, prompt, tiny_model.encode_context(torch.cat([context, answer], dim=1))


def test_an_answer_from_the_context_takes_fewer_passes(quoting):
    model, prompt, cache = quoting
    passes = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    got, lookup = looked_up(model, prompt, cache, max_new_tokens=40, eos_token_id=None)
    hook.remove()
    assert torch.equal(got, plain(model, prompt, cache, max_new_tokens=40, eos_token_id=None))
    assert lookup.passes == len(passes) < 40
    # drafts were verified several tokens at once
    assert max(passes[1:]) > 1
    assert 0 < lookup.accepted <= lookup.drafted
    assert lookup.accepted + lookup.passes == 40
    assert 0 < lookup.acceptance <= 1


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"num_tokens": 1}])
def test_tokens_are_those_of_plain_decoding(variant_model, batch, options):
    num_tokens = options.pop("num_tokens", 5)
    cache = variant_model.encode_context(batch["context_input_ids"][:1].repeat(1, 3))
    prompt = batch["input_ids"][:1]
    expected = plain(variant_model, prompt, cache, max_new_tokens=24, **options)
    got, _ = looked_up(variant_model, prompt, cache, num_tokens, max_new_tokens=24, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("quantized", ["int8", "int4"])
def test_quantized_and_joined_contexts(tiny_model, batch, quantized):
    cache = tiny_model.encode_context(batch["context_input_ids"], batch["context_attention_mask"])
    cache = cache.quantize(quantized).join([[1, 0]])
    prompt = batch["input_ids"][:1]
    got, lookup = looked_up(tiny_model, prompt, cache, max_new_tokens=24)
    assert torch.equal(got, plain(tiny_model, prompt, cache, max_new_tokens=24))
    assert torch.equal(lookup.token_ids, cache.row_token_ids(0).long())


def test_a_plain_call_returns_tokens(tiny_model, batch):
    cache = tiny_model.encode_context(batch["context_input_ids"][:1])
    got = plain(tiny_model, batch["input_ids"][:1], cache, context_lookup_num_tokens=3, max_new_tokens=5)
    assert isinstance(got, torch.Tensor)


@settings(deadline=None)
@given(
    context=st.lists(st.integers(0, 4), max_size=30),
    recent=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    longest=st.integers(2, 5),
    num_tokens=st.integers(1, 6),
)
def test_a_draft_follows_the_longest_match(context, recent, longest, num_tokens):
    draft = ContextLookup(torch.tensor(context, dtype=torch.int64)).find(torch.tensor(recent), longest, num_tokens)
    for size in range(min(longest, len(recent)), 1, -1):
        starts = [i for i in range(len(context) - size) if context[i : i + size] == recent[-size:]]
        if starts:
            assert draft.tolist() == context[starts[0] + size : starts[0] + size + num_tokens]
            return
    assert draft.tolist() == []


def test_bad_input(tiny_model, batch, make_llama):
    prompt = batch["input_ids"]
    cache = tiny_model.encode_context(batch["context_input_ids"])
    with pytest.raises(ValueError, match="needs a context to look into"):
        tiny_model.generate(prompt, context_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="leave out `prompt_lookup_num_tokens`"):
        tiny_model.generate(prompt, context_cache=cache, context_lookup_num_tokens=3, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="leave out `assistant_model`"):
        tiny_model.generate(prompt, context_cache=cache, context_lookup_num_tokens=3, assistant_model=make_llama())
    with pytest.raises(ValueError, match="batch_size = 1"):
        tiny_model.generate(prompt, context_cache=cache, context_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="max_matching_ngram_size.*at least 2, got 1"):
        tiny_model.generate(
            prompt[:1], context_cache=cache.select([0]), context_lookup_num_tokens=3, max_matching_ngram_size=1
        )
