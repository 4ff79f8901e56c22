"""Contexts are encoded and projected once and shared; joined documents have no order; limits and sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_xcllama import ContextCache, XCLlamaForCausalLM


@pytest.fixture(scope="module")
def model(make_sharp_model):
    return make_sharp_model()


@pytest.fixture(scope="module")
def condensed(make_sharp_model):
    return make_sharp_model(cross_attention_share_key_value=True)


def random_ids(*shape, seed=1):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


class Counter:
    """Counts calls, and tokens, of what encodes and what projects."""

    def __init__(self, model, monkeypatch):
        self.encoded, self.projected = [], []
        inner, projection = model.model, model.model.context_projections[0]
        original = inner.encode_batch
        monkeypatch.setattr(inner, "encode_batch", lambda ids, mask: self.encoded.append(ids) or original(ids, mask))
        self.hook = projection.register_forward_hook(
            lambda module, inputs, output: self.projected.append(inputs[0].shape[0])
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 4},
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "returned_beams", "samples", "chunks", "static", "no_cache"],
)
def test_encoded_and_projected_once(model, monkeypatch, options):
    counter = Counter(model, monkeypatch)
    ids = random_ids(2, 19)
    model.generate(random_ids(2, 5), context_input_ids=ids, max_new_tokens=6, **{"do_sample": False} | options)
    assert len(counter.encoded) == 1
    assert counter.projected == [38]
    counter.hook.remove()


def test_a_projected_context_is_never_projected_again(model, monkeypatch):
    cache = model.encode_context(random_ids(2, 19))
    projected = model.project_context(cache)
    counter = Counter(model, monkeypatch)
    for _ in range(3):
        model.generate(random_ids(2, 5), context_cache=projected, max_new_tokens=4, do_sample=False)
    assert counter.projected == counter.encoded == []
    counter.hook.remove()


def test_keys_and_values_of_another_model_are_refused(make_sharp_model, make_sharp_llama):
    """The same decoder, so the same cache, and other projections of the same shape."""
    base = make_sharp_llama()
    model, other = make_sharp_model(base), make_sharp_model(base, seed=5)
    projected = other.project_context(model.encode_context(random_ids(2, 19)))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="another model projected these keys and values"):
            call(random_ids(2, 5), context_cache=projected)


def test_a_document_that_many_rows_read_is_projected_once(model, monkeypatch):
    cache = model.encode_context(random_ids(2, 19))
    counter = Counter(model, monkeypatch)
    projected = model.project_context(cache.select([0] * 50 + [1] * 50))
    assert counter.projected == [38]
    assert projected.keys[0].shape[0] == 38
    counter.hook.remove()


def test_condensed_caches_project_nothing(condensed, monkeypatch):
    cache = condensed.encode_context(random_ids(2, 19))
    counter = Counter(condensed, monkeypatch)
    condensed.generate(random_ids(2, 5), context_cache=cache, max_new_tokens=4, do_sample=False)
    assert counter.projected == []
    projected = condensed.project_context(cache)
    assert projected.keys[0].data_ptr() == cache.states["key"].data_ptr()
    counter.hook.remove()


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"do_sample": True, "num_return_sequences": 4}])
def test_beams_and_sequences_share_storage(model, options):
    """Eight rows read the two contexts in place: the keys that reach the layers are those that were projected."""
    projected = model.project_context(model.encode_context(random_ids(2, 19)))
    seen = []
    hook = model.model.cross_attention_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args))
    model.generate(random_ids(2, 5), context_cache=projected, max_new_tokens=3, **options)
    hook.remove()
    for hidden_states, key, value, rows, *_ in seen:
        assert hidden_states.shape[0] == len(rows) == 8
        assert key.data_ptr() == projected.keys[0].data_ptr()
        assert value.data_ptr() == projected.values[0].data_ptr()
        assert key.shape[0] == 38
        assert rows.context_index == (0, 0, 0, 0, 1, 1, 1, 1)


def test_select_and_join_share_storage(model):
    cache = model.encode_context(random_ids(3, 11))
    address = cache.states["hidden"].data_ptr()
    for other in (cache.select([2, 0]), cache.join([[0, 2], [], [1]]), cache.select([1] * 100)):
        assert other.states["hidden"].data_ptr() == address


@settings(max_examples=30, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 12), min_size=2, max_size=5))
def test_joined_documents_have_no_order(model, condensed, data, lengths):
    """Without RoPE on the context, any order of the documents gives the same logits."""
    order = data.draw(st.permutations(range(len(lengths))))
    question = random_ids(1, 4, seed=9)
    for one in (model, condensed):
        caches = [one.encode_context(random_ids(1, length, seed=i)) for i, length in enumerate(lengths)]
        cache = ContextCache.concat(caches)
        with torch.no_grad():
            first = one(question, context_cache=cache.join([range(len(lengths))])).logits
            second = one(question, context_cache=cache.join([order])).logits
        torch.testing.assert_close(first, second, atol=2e-4, rtol=2e-4)


def test_with_rope_the_order_counts(make_sharp_model):
    """The property above could fail: with RoPE it does."""
    model = make_sharp_model(cross_attention_rope=True)
    cache = model.encode_context(random_ids(2, 19))
    question = random_ids(1, 4, seed=9)
    with torch.no_grad():
        first, second = (model(question, context_cache=cache.join([order])).logits for order in ([0, 1], [1, 0]))
    assert (first - second).abs().max() > 1e-2


def test_join_of_hundreds_of_documents(model):
    cache = model.encode_context(random_ids(1, 7))
    many = ContextCache.concat([model.encode_context(random_ids(1, 5 + i % 4, seed=i)) for i in range(300)])
    joined = many.join([range(300), range(0, 300, 2)])
    question = random_ids(2, 4, seed=9)
    with torch.no_grad():
        got = model(question, context_cache=joined).logits
        # one document of the same tokens' states, packed by hand
        hidden = many.states["hidden"]
        packed = torch.cat([hidden, *(hidden[many.offsets[d] : many.offsets[d + 1]] for d in range(0, 300, 2))])
        bounds = (0, len(hidden), len(packed))
        expected = model(
            question,
            context_cache=ContextCache({"hidden": packed}, bounds, torch.zeros(len(packed)).int(), cache.fingerprint),
        ).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quantized", [None, "int8"])
def test_hundred_thousand_tokens(condensed, quantized):
    """A context of 100,000 tokens answers as the same states in fp64 say."""
    length, generator = 100_000, torch.Generator().manual_seed(3)
    states = {name: torch.randn(length, 2, 8, generator=generator) for name in ("key", "value")}
    ids = torch.zeros(length, dtype=torch.int32)
    cache = ContextCache(states, (0, length), ids, condensed.model.context_fingerprint())
    cache = cache if quantized is None else cache.quantize(quantized)
    block = condensed.model.cross_attention_blocks[0]
    projected = condensed.project_context(cache)
    hidden = torch.randn(1, 3, 32, generator=generator)
    with torch.no_grad():
        got, _ = block(hidden, projected.keys[0], projected.values[0], projected.rows, "sdpa")
        key, value = (state.double().repeat_interleave(2, dim=1) for state in states.values())
        query = block.q_proj(block.input_norm(hidden)).unflatten(-1, (4, 8)).double()[0]
        weights = (torch.einsum("qhd,khd->hqk", query, key) * 8**-0.5).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", weights, value).flatten(1).float()
        expected = hidden + block.o_proj(attended)
    torch.testing.assert_close(got, expected, atol=1e-4 if quantized is None else 0.1, rtol=1e-3)
    out = condensed.generate(random_ids(1, 4), context_cache=cache, max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 6)


def test_a_text_of_hundred_thousand_tokens(model, tmp_path):
    """Encoded in windows, saved, mapped, projected by the token, read."""
    ids = random_ids(1, 100_000)
    model.encode_context(ids).save(tmp_path / "long.safetensors")
    cache = model.load_context(tmp_path / "long.safetensors")
    assert cache.lengths == [100_000]
    assert torch.equal(cache.row_token_ids(0), ids[0].int())
    projected = model.project_context(cache)
    report = projected.memory_report()
    assert report.mapped_bytes == 100_000 * 32 * 4
    assert report.key_value_bytes == 100_000 * 2 * 2 * 16 * 4
    prompt = random_ids(1, 4, seed=2)
    out = model.generate(prompt, context_cache=projected, max_new_tokens=3, do_sample=False)
    expected = prompt
    with torch.no_grad():
        for _ in range(3):
            logits = model(expected, context_cache=cache, use_cache=False).logits[:, -1]
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=-1)
    assert torch.equal(out, expected)


def test_memory_report(model, condensed, tmp_path):
    """The paper's point: the states of a token grow when they become keys and values of every layer."""
    ids = random_ids(2, 50)
    path = tmp_path / "cache.safetensors"
    model.encode_context(ids).save(path)
    cache = model.load_context(path)
    before = cache.memory_report()
    assert before.num_tokens == 100
    assert before.num_rows == 2
    assert before.file_bytes == path.stat().st_size
    assert before.mapped_bytes == before.state_bytes == 100 * 32 * 4
    assert before.key_value_bytes == 0
    after = model.project_context(cache).memory_report()
    # two layers, keys and values, two heads of 8, in fp32
    assert after.key_value_bytes == 100 * 2 * 2 * 16 * 4
    assert after.to_dict()["mapped_bytes"] == 12800
    assert "key value:" in str(after)
    assert "256.0 bytes a token" in str(after)
    # the condensed layout holds keys and values already: nothing more becomes resident
    condensed.encode_context(ids).save(path)
    cache = condensed.load_context(path)
    report = condensed.project_context(cache).memory_report()
    assert report.key_value_bytes == 0
    assert report.mapped_bytes == report.state_bytes == 100 * 2 * 16 * 4


def test_memory_report_of_the_papers_sizes():
    """Llama-2-7B in 16 bit with the paper's four layers of width 1024: 8 KiB a token in the file, 16 KiB projected."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=4096,
        intermediate_size=64,
        num_hidden_layers=4,
        # narrow self-attention keeps this quick, the context's sizes do not depend on it
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=4,
    )
    base = LlamaForCausalLM(config).bfloat16().eval()
    model = XCLlamaForCausalLM.from_decoder(
        base,
        init="random",
        cross_attention_layers=[0, 1, 2, 3],
        cross_attention_hidden_size=1024,
        cross_attention_head_dim=32,
    )
    report = model.project_context(model.encode_context(random_ids(1, 4))).memory_report()
    assert report.state_bytes == 4 * 8 * 1024
    assert report.key_value_bytes == 4 * 16 * 1024
