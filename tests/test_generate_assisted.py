"""Assisted decoding: what the draft model reads, and that the answer is the model's own."""

import pytest
import torch


@pytest.fixture(scope="module")
def base(make_sharp_llama):
    return make_sharp_llama()


@pytest.fixture(scope="module")
def model(base, make_sharp_model):
    return make_sharp_model(base)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(3, 97, (1, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def context_ids():
    return torch.randint(3, 97, (1, 31), generator=torch.Generator().manual_seed(4))


def plain_loop(model, ids, cache, new_tokens):
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(ids, context_cache=cache, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=-1)
    return ids


class Spy:
    """Notes the keyword arguments of every forward call of a model."""

    def __init__(self, model):
        self.calls = []
        self.hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: self.calls.append(kwargs), with_kwargs=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


def check(model, draft, prompt, cache, **options):
    expected = plain_loop(model, prompt, cache, 20)
    assert not torch.equal(expected, plain_loop(model, prompt, None, 20)), "the context must matter"
    with Spy(draft) as drafts, Spy(model) as targets:
        got = model.generate(
            prompt, context_cache=cache, assistant_model=draft, max_new_tokens=20, do_sample=False, **options
        )
    assert torch.equal(got, expected)
    assert drafts.calls
    return drafts.calls, targets.calls


def test_a_plain_draft_reads_no_context(model, prompt, context_ids, make_sharp_llama):
    draft = make_sharp_llama(seed=1, hidden_size=16)
    drafted, _ = check(model, draft, prompt, model.encode_context(context_ids))
    assert all("context_cache" not in call for call in drafted)


def test_an_xc_draft_reads_the_same_cache_with_its_own_projections(base, model, prompt, context_ids, make_sharp_model):
    # same decoder and context layer, so the same cache; fewer cross-attention blocks with other weights
    draft = make_sharp_model(base, seed=5, cross_attention_layers=[3])
    cache = model.encode_context(context_ids)
    drafted, _ = check(model, draft, prompt, cache)
    for call in drafted:
        assert call["context_cache"].cache is cache
        assert len(call["context_cache"].keys) == 1


def test_an_xc_draft_of_another_size_reads_its_own_cache(
    model, prompt, context_ids, make_sharp_model, make_sharp_llama
):
    draft = make_sharp_model(make_sharp_llama(seed=2, hidden_size=16), seed=6)
    cache, own = model.encode_context(context_ids), draft.encode_context(context_ids)
    drafted, targets = check(model, draft, prompt, cache, assistant_context_cache=own)
    assert all(call["context_cache"].cache is own for call in drafted)
    assert all(call["context_cache"].cache is cache for call in targets)


def test_the_draft_projects_once(base, model, prompt, context_ids, monkeypatch, make_sharp_model):
    draft = make_sharp_model(base, seed=5)
    cache, projected = model.encode_context(context_ids), []
    for one in (model, draft):
        original = one.model.project_context
        monkeypatch.setattr(
            one.model, "project_context", lambda c, original=original: projected.append(c) or original(c)
        )
    check(model, draft, prompt, model.project_context(cache))
    # the model's before generate, the draft's at its start; the reference loop was handed the projected context
    assert len(projected) == 2


def test_a_good_draft_saves_steps(base, model, prompt, context_ids, make_sharp_model):
    """The model as its own draft: every candidate is accepted."""
    draft = make_sharp_model(base)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    cache = model.encode_context(context_ids)
    with Spy(model) as targets:
        got = model.generate(prompt, context_cache=cache, assistant_model=draft, max_new_tokens=20, do_sample=False)
    assert torch.equal(got, plain_loop(model, prompt, cache, 20))
    assert len(targets.calls) == 4


def test_early_exit_drafts_with_the_models_own_context(model, prompt, context_ids):
    cache = model.encode_context(context_ids)
    got = model.generate(prompt, context_cache=cache, assistant_early_exit=3, max_new_tokens=20, do_sample=False)
    assert torch.equal(got, plain_loop(model, prompt, cache, 20))
    assert model.config.num_hidden_layers == 4


def test_assisted_sampling_follows_the_model(base, model, prompt, context_ids, make_sharp_model):
    """Speculative sampling keeps the model's distribution: with one token left to choose it must choose that."""
    cache = model.encode_context(context_ids)
    draft = make_sharp_model(base, seed=5)
    got = model.generate(
        prompt, context_cache=cache, assistant_model=draft, max_new_tokens=20, do_sample=True, top_k=1
    )
    assert torch.equal(got, plain_loop(model, prompt, cache, 20))


def test_clear_errors(model, base, prompt, context_ids, make_sharp_model, make_sharp_llama):
    cache = model.encode_context(context_ids)
    other = make_sharp_model(make_sharp_llama(seed=2, hidden_size=16), seed=6)
    with pytest.raises(ValueError, match="assistant_context_cache=assistant_model.encode_context"):
        model.generate(prompt, context_cache=cache, assistant_model=other, max_new_tokens=4)
    with pytest.raises(ValueError, match="needs an XC model"):
        model.generate(prompt, context_cache=cache, assistant_model=base, assistant_context_cache=cache)
    with pytest.raises(ValueError, match="needs a `context_cache`"):
        model.generate(prompt, assistant_model=other, assistant_context_cache=other.encode_context(context_ids))
    with pytest.raises(ValueError, match="made by another model|states of this cache"):
        model.generate(prompt, context_cache=cache, assistant_model=other, assistant_context_cache=cache)
    with pytest.raises(ValueError, match="`assistant_context_cache` needs"):
        model.generate(prompt, context_cache=cache, assistant_context_cache=cache)
