"""Contrastive decoding: away from the answer without a context, and contrastive search as a custom function."""

import pytest
import torch
from torch.nn import functional

NEW_TOKENS, TOP_K, ALPHA, GUIDANCE = 9, 4, 0.6, 1.8


@pytest.fixture(scope="module", params=[{}, {"cross_attention_share_key_value": True}], ids=["hidden", "condensed"])
def model(request, make_sharp_model):
    return make_sharp_model(**request.param)


def random_ids(*shape, seed=1):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cache(model):
    return model.encode_context(random_ids(2, 23))


@pytest.fixture
def inputs():
    """Two questions of different lengths, left-padded."""
    ids, mask = random_ids(2, 7, seed=2), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3], ids[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def plain_loop(inputs, choose):
    """Each row without padding, by itself; `choose` sees all of its ids and says the next one."""
    written = []
    for row, (ids, mask) in enumerate(zip(*inputs.values(), strict=True)):
        ids = ids[mask.bool()]
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, choose(row, ids)[None]])
        written.append(ids[-NEW_TOKENS:].tolist())
    return written


def generate(model, inputs, cache, **options):
    out = model.generate(**inputs, context_cache=cache, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def test_guidance_away_from_the_answer_without_a_context(model, cache, inputs):
    """Classifier-free guidance, whose other prompt reads no context."""

    def choose(row, ids):
        contexts = (cache.select([row]), None)
        reading, bare = (model(ids[None], context_cache=context).logits[0, -1].log_softmax(-1) for context in contexts)
        return (bare + GUIDANCE * (reading - bare)).argmax()

    options = {"negative_prompt_ids": inputs["input_ids"], "negative_prompt_attention_mask": inputs["attention_mask"]}
    got = generate(model, inputs, cache, guidance_scale=GUIDANCE, **options)
    assert got == plain_loop(inputs, choose)
    assert got != generate(model, inputs, cache)


def contrastive_search(model, input_ids, **kwargs):
    """The candidate least like all tokens before it; all are tried in one pass, and read one context."""
    mask, context = kwargs["attention_mask"], kwargs["context_cache"]
    tried_context = context.select([row for row in range(len(input_ids)) for _ in range(TOP_K)])
    assert tried_context.keys[0] is context.keys[0]

    def step(ids, mask, context, past=None):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        fields = {"attention_mask": mask, "position_ids": positions, "past_key_values": past, "use_cache": True}
        out = model(ids, **fields, context_cache=context, output_hidden_states=True)
        return out.hidden_states[-1], out.logits[:, -1], out.past_key_values

    states, logits, past = step(input_ids, mask, context)
    for _ in range(NEW_TOKENS):
        probabilities, tokens = logits.softmax(-1).topk(TOP_K)
        past.batch_repeat_interleave(TOP_K)
        seen, mask = mask, functional.pad(mask, (0, 1), value=1)
        tried, logits, past = step(tokens.view(-1, 1), mask.repeat_interleave(TOP_K, 0), tried_context, past)
        likeness = functional.cosine_similarity(tried.unflatten(0, (-1, TOP_K)), states[:, None], dim=-1)
        likeness = likeness.masked_fill(seen[:, None] == 0, -torch.inf).amax(-1)
        best = ((1 - ALPHA) * probabilities - ALPHA * likeness).argmax(-1)
        chosen = torch.arange(len(input_ids)) * TOP_K + best
        past.batch_select_indices(chosen)
        logits, states = logits[chosen], torch.cat([states, tried[chosen]], dim=1)
        input_ids = torch.cat([input_ids, tokens.gather(1, best[:, None])], dim=-1)
    return input_ids


def test_contrastive_search(model, cache, inputs):
    def choose(row, ids):
        context = cache.select([row])
        probabilities, tokens = model(ids[None], context_cache=context).logits[0, -1].softmax(-1).topk(TOP_K)
        scores = []
        for probability, token in zip(probabilities, tokens, strict=True):
            grown = torch.cat([ids, token[None]])
            states = model(grown[None], context_cache=context, output_hidden_states=True).hidden_states[-1][0]
            scores.append(
                (1 - ALPHA) * probability - ALPHA * functional.cosine_similarity(states[-1:], states[:-1]).max()
            )
        return tokens[torch.stack(scores).argmax()]

    got = generate(model, inputs, cache, custom_generate=contrastive_search)
    assert got == plain_loop(inputs, choose)
    assert got != generate(model, inputs, cache)
