"""Every decoding mode of generate() gives, token by token, what a plain loop without any cache or padding gives."""

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextStreamer,
)

NEW_TOKENS = 9
LAYOUTS = {
    "hidden": {},
    "condensed": {"cross_attention_share_key_value": True},
    "rope_mlp": {"cross_attention_rope": True, "cross_attention_intermediate_size": 24},
}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def model(request, make_sharp_model):
    return make_sharp_model(**LAYOUTS[request.param])


@pytest.fixture(scope="module")
def plain(make_sharp_model):
    return make_sharp_model()


def contexts(model):
    """Two contexts of different lengths, and two questions of different lengths, left-padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, 23), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    questions = torch.randint(3, 97, (2, 7), generator=generator)
    attention = torch.ones_like(questions)
    attention[0, :3], questions[0, :3] = 0, 0
    return model.encode_context(ids, mask), questions, attention


@torch.no_grad()
def plain_loop(model, prompt, cache, new_tokens=NEW_TOKENS, choose=lambda ids, logits: logits.argmax(-1)):
    """One row without padding: the whole sequence goes through the model again for every token."""
    ids = prompt[None]
    for _ in range(new_tokens):
        logits = model(ids, context_cache=cache, use_cache=False).logits[:, -1].float()
        ids = torch.cat([ids, choose(ids, logits)[:, None]], dim=-1)
    return ids[0, len(prompt) :].tolist()


def expected_rows(model, cache, questions, attention, **kwargs):
    rows = zip(range(len(questions)), questions, attention, strict=True)
    return [plain_loop(model, ids[mask.bool()], cache.select([row]), **kwargs) for row, ids, mask in rows]


def generate(model, questions, attention, **kwargs):
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
    out = model.generate(questions, attention_mask=attention, **options)
    return out[:, questions.shape[1] :].tolist()


def test_greedy_batch(model):
    cache, questions, attention = contexts(model)
    expected = expected_rows(model, cache, questions, attention)
    assert generate(model, questions, attention, context_cache=cache) == expected
    # the comparison means something only if the context and what was written decide what is written
    assert all(len(set(row)) > NEW_TOKENS // 2 for row in expected)
    assert generate(model, questions, attention) != expected
    assert generate(model, questions, attention, context_cache=cache.select([1, 0])) != expected


def test_context_ids_instead_of_a_cache(model):
    cache, questions, attention = contexts(model)
    lengths = cache.lengths
    ids = torch.zeros((2, max(lengths)), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = cache.row_token_ids(row)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    got = generate(model, questions, attention, context_input_ids=ids, context_attention_mask=mask)
    assert got == expected_rows(model, cache, questions, attention)


def test_row_without_a_context(model):
    cache, questions, attention = contexts(model)
    joined = cache.join([[0, 1], []])
    got = generate(model, questions, attention, context_cache=joined)
    assert got == expected_rows(model, joined, questions, attention)
    bare = plain_loop(model, questions[1], None)
    assert got[1] == bare


def test_rows_that_end_at_different_steps(model):
    """A row that has ended is padded, the others go on."""
    cache, questions, attention = contexts(model)
    expected = expected_rows(model, cache, questions, attention)
    end = next(token for token in expected[0][2:-2] if token not in expected[1])
    length = expected[0].index(end) + 1
    got = generate(model, questions, attention, context_cache=cache, eos_token_id=end, pad_token_id=0)
    assert got == [expected[0][:length] + [0] * (NEW_TOKENS - length), expected[1]]


@torch.no_grad()
def reference_beams(model, prompt, cache, num_beams):
    """Beam search with no end token: the best sums of log probabilities, best first."""
    beams = [(0.0, prompt.tolist())]
    for _ in range(NEW_TOKENS):
        grown = []
        for score, ids in beams:
            logits = model(torch.tensor([ids]), context_cache=cache, use_cache=False).logits[0, -1].float()
            values, tokens = logits.log_softmax(-1).topk(num_beams)
            grown += [(score + float(v), [*ids, int(t)]) for v, t in zip(values, tokens, strict=True)]
        beams = sorted(grown, reverse=True)[:num_beams]
    return [ids[len(prompt) :] for _, ids in beams]


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search_batch(model, num_beams):
    cache, questions, attention = contexts(model)
    options = {"num_beams": num_beams, "num_return_sequences": num_beams, "context_cache": cache}
    got = generate(model, questions, attention, **options)
    expected = [
        beam
        for row in range(2)
        for beam in reference_beams(model, questions[row][attention[row].bool()], cache.select([row]), num_beams)
    ]
    assert got == expected


def test_sampling_with_several_sequences(plain):
    cache, questions, _ = contexts(plain)
    prompt = questions[1]
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "context_cache": cache.select([1])}
    torch.manual_seed(7)
    got = generate(plain, prompt[None], torch.ones(1, 7), num_return_sequences=3, **options)
    torch.manual_seed(7)
    ids, wide = prompt.repeat(3, 1), cache.select([1, 1, 1])
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = plain(ids, context_cache=wide, use_cache=False).logits[:, -1].float()
            ids = torch.cat([ids, torch.multinomial((logits / 1.5).softmax(-1), 1)], dim=-1)
    assert got == ids[:, 7:].tolist()
    assert len(set(map(tuple, got))) > 1


class NoRepeats(LogitsProcessor):
    """Never the same token twice."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids, -torch.inf)


def test_constrained_by_a_logits_processor(model):
    cache, questions, attention = contexts(model)

    def choose(ids, logits):
        return NoRepeats()(ids, logits).argmax(-1)

    processors = LogitsProcessorList([NoRepeats()])
    got = generate(model, questions, attention, context_cache=cache, logits_processor=processors)
    assert got == expected_rows(model, cache, questions, attention, choose=choose)


def test_constrained_to_allowed_tokens(plain):
    cache, questions, attention = contexts(plain)
    allowed = list(range(10, 30))

    def choose(ids, logits):
        mask = torch.full_like(logits, -torch.inf)
        mask[:, allowed] = 0
        return (logits + mask).argmax(-1)

    options = {"prefix_allowed_tokens_fn": lambda batch, ids: allowed, "context_cache": cache}
    got = generate(plain, questions, attention, **options)
    assert got == expected_rows(plain, cache, questions, attention, choose=choose)
    beams = generate(plain, questions, attention, num_beams=3, **options)
    assert all(token in allowed for row in beams for token in row)


def test_custom_generate_function(plain):
    cache, questions, attention = contexts(plain)

    def second_best(model, input_ids, generation_config, **kwargs):
        ids, context, mask = input_ids, kwargs["context_cache"], kwargs["attention_mask"]
        for _ in range(NEW_TOKENS):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions, context_cache=context).logits[:, -1]
            ids = torch.cat([ids, logits.topk(2).indices[:, 1:]], dim=-1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        return ids

    got = generate(plain, questions, attention, context_cache=cache, custom_generate=second_best)
    expected = expected_rows(
        plain, cache, questions, attention, choose=lambda ids, logits: logits.topk(2).indices[:, 1]
    )
    assert got == expected


def test_streamer(plain):
    cache, questions, _ = contexts(plain)

    class Collector(TextStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Collector()
    prompt, row = questions[1:], cache.select([1])
    got = generate(plain, prompt, torch.ones_like(prompt), context_cache=row, streamer=streamer)
    assert streamer.tokens == prompt[0].tolist() + got[0]
    assert streamer.ended
    assert got[0] == plain_loop(plain, prompt[0], row)


def test_prompt_lookup(model):
    cache, questions, _ = contexts(model)
    row = cache.select([1])
    calls = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    # a prompt that holds its own continuation, so that candidates are found and accepted
    prompt = questions[1]
    prompt = torch.cat([prompt, torch.tensor(plain_loop(model, prompt, row, 12)), prompt])[None]
    calls.clear()
    got = generate(
        model, prompt, torch.ones_like(prompt), context_cache=row, prompt_lookup_num_tokens=3, max_new_tokens=16
    )
    hook.remove()
    assert any(length > 1 for length in calls[1:])
    assert got[0] == plain_loop(model, prompt[0], row, 16)


def test_static_cache(model):
    cache, questions, attention = contexts(model)
    got = generate(
        model, questions, attention, context_cache=cache, cache_implementation="static", disable_compile=True
    )
    assert got == expected_rows(model, cache, questions, attention)
    beams = {"num_beams": 3, "context_cache": cache}
    static = generate(model, questions, attention, cache_implementation="static", disable_compile=True, **beams)
    assert static == generate(model, questions, attention, **beams)


def test_static_cache_compiled(plain):
    cache, questions, attention = contexts(plain)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    got = generate(plain, questions, attention, context_cache=cache, **options)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    assert got == expected_rows(plain, cache, questions, attention)
    # contexts of other lengths: compiled again, and right again
    other = cache.join([[0, 1], [1]])
    got = generate(plain, questions, attention, context_cache=other, **options)
    assert got == expected_rows(plain, other, questions, attention)
    torch._dynamo.reset()


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_chunked_prefill(model, chunk):
    cache, questions, attention = contexts(model)
    lengths = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    got = generate(model, questions, attention, context_cache=cache, prefill_chunk_size=chunk)
    hook.remove()
    assert lengths[0] == min(chunk, 7)
    assert got == expected_rows(model, cache, questions, attention)


def test_several_turns_on_one_projected_context(model):
    cache, questions, _ = contexts(model)
    row = cache.select([1])
    projected = model.project_context(row)
    past = DynamicCache(config=model.config)
    ids = questions[1:]
    for turn in range(3):
        prompt_length, seen = ids.shape[1], past.get_seq_length()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            context_cache=projected,
            past_key_values=past,
            max_new_tokens=5,
            do_sample=False,
        )
        assert out[0, prompt_length:].tolist() == plain_loop(model, ids[0], row, 5)
        # the earlier turns were not read again
        assert seen == 0 if turn == 0 else seen > 5
        ids = torch.cat([out, questions[:1, 3:] + turn], dim=1)


def test_input_embeddings(plain):
    cache, questions, _ = contexts(plain)
    prompt, row = questions[1:], cache.select([1])
    embeds = plain.get_input_embeddings()(prompt)
    out = plain.generate(inputs_embeds=embeds, context_cache=row, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert out[0].tolist() == plain_loop(plain, prompt[0], row)


def test_generation_config_object(plain):
    cache, questions, attention = contexts(plain)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, use_cache=False)
    out = plain.generate(questions, config, attention_mask=attention, context_cache=cache)
    assert out[:, 7:].tolist() == expected_rows(plain, cache, questions, attention)


def test_wrong_number_of_contexts(plain):
    cache, questions, attention = contexts(plain)
    with pytest.raises(ValueError, match="the context has 1 rows and the batch 2"):
        generate(plain, questions, attention, context_cache=cache.select([0]))
    with pytest.raises(ValueError, match="not both"):
        generate(plain, questions, attention, context_cache=cache, context_input_ids=questions)
