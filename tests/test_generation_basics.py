import pytest
import torch


def step_loop(model, input_ids, cache, steps: int, attention_mask=None) -> torch.Tensor:
    """Greedy decoding without any cache of the decoder: the whole sequence again at every step."""
    for _ in range(steps):
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(
            input_ids, context_cache=cache, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), 1)], dim=1)
    return input_ids


@pytest.fixture
def cache(variant_model, batch):
    return variant_model.encode_context(batch["context_input_ids"], batch["context_attention_mask"])


@pytest.fixture(autouse=True)
def no_early_end(request):
    """Let decoding run on to the last step."""
    if "variant_model" in request.fixturenames:
        request.getfixturevalue("variant_model").generation_config.eos_token_id = None


def test_greedy(variant_model, batch, cache):
    expected = step_loop(variant_model, batch["input_ids"], cache, 8)
    generated = variant_model.generate(batch["input_ids"], context_cache=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, expected)
    assert not torch.equal(generated, step_loop(variant_model, batch["input_ids"], None, 8))


def test_left_padded_batch(variant_model, batch, cache):
    ids = batch["input_ids"].clone()
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    options = {"max_new_tokens": 8, "do_sample": False}
    generated = variant_model.generate(ids, attention_mask=mask, context_cache=cache, **options)
    assert torch.equal(generated, step_loop(variant_model, ids, cache, 8, mask))
    alone = variant_model.generate(ids[1:, 3:], context_cache=cache.select([1]), **options)
    assert torch.equal(generated[1, 3:], alone[0])


def test_rows_share_one_context(variant_model, batch, cache):
    shared = cache.select([0, 0])
    generated = variant_model.generate(batch["input_ids"], context_cache=shared, max_new_tokens=8, do_sample=False)
    for row in range(2):
        ids = batch["input_ids"][row : row + 1]
        assert torch.equal(generated[row : row + 1], step_loop(variant_model, ids, cache.select([0]), 8))
    assert variant_model.project_context(shared).keys[0].shape[0] == 11


def test_joined_and_absent_contexts(variant_model, batch, cache):
    rows = cache.join([[1, 0], []])
    generated = variant_model.generate(batch["input_ids"], context_cache=rows, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, step_loop(variant_model, batch["input_ids"], rows, 8))
    plain = step_loop(variant_model, batch["input_ids"][1:], None, 8)
    assert torch.equal(generated[1:], plain)


def test_sampling_follows_the_seed(variant_model, batch, cache):
    def sample():
        torch.manual_seed(7)
        return variant_model.generate(
            batch["input_ids"], context_cache=cache, max_new_tokens=8, do_sample=True, top_k=0
        )

    def sample_loop():
        torch.manual_seed(7)
        ids = batch["input_ids"]
        for _ in range(8):
            probabilities = variant_model(ids, context_cache=cache, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
        return ids

    with torch.no_grad():
        assert torch.equal(sample(), sample_loop())


def test_keys_and_values_are_projected_once(variant_model, batch, cache):
    calls = []
    for projection in variant_model.model.context_projections:
        projection.register_forward_hook(lambda *_: calls.append(1))
    variant_model.generate(batch["input_ids"], context_cache=cache, max_new_tokens=8, do_sample=False)
    condensed = cache.layout == "condensed"
    assert len(calls) == (0 if condensed else len(variant_model.model.context_projections))
    projected = variant_model.project_context(cache)
    calls.clear()
    variant_model.generate(batch["input_ids"], context_cache=projected, max_new_tokens=2, do_sample=False)
    assert not calls
