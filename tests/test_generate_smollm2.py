"""The main decoding modes on a real model: SmolLM2-135M equals a plain loop, token by token."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, DynamicCache

from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor

pytestmark = pytest.mark.slow
NEW_TOKENS = 12
TEXTS = [
    "The Amazon rainforest covers most of the Amazon basin of South America. This basin encompasses 7,000,000 square "
    "kilometres, of which 5,500,000 are covered by the rainforest.",
    "The Normans were the people who in the 10th and 11th centuries gave their name to Normandy, a region in France.",
]
QUESTIONS = ["How large is the basin?", "In which country is the region that the Normans gave their name to?"]


@pytest.fixture(scope="module")
def base(smollm2_folder):
    return AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(base):
    layers = [14, 16, 18, 20, 22, 24, 26, 28]
    return XCLlamaForCausalLM.from_decoder(base, context_layer=15, cross_attention_layers=layers)


@pytest.fixture(scope="module")
def processor(smollm2_folder):
    return XCLlamaProcessor(AutoTokenizer.from_pretrained(smollm2_folder))


@pytest.fixture(scope="module")
def cache(model, processor):
    return model.encode_context(**processor(contexts=TEXTS, return_tensors="pt"))


@pytest.fixture(scope="module")
def inputs(processor):
    """Two questions, left-padded."""
    inputs = processor(text=QUESTIONS, return_tensors="pt")
    assert inputs["attention_mask"].min() == 0
    return inputs


def prompt_of(inputs, row):
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()]


@torch.no_grad()
def plain_loop(model, prompt, cache, new_tokens=NEW_TOKENS, choose=lambda logits: logits.argmax(-1)):
    """What is written after `prompt`: the whole sequence goes through the model again for every token."""
    ids, ends = prompt[None], model.generation_config.eos_token_id
    for _ in range(new_tokens):
        logits = model(ids, context_cache=cache, use_cache=False, logits_to_keep=1).logits[:, -1]
        ids = torch.cat([ids, choose(logits)[:, None]], dim=-1)
        if int(ids[0, -1]) == ends:
            break
    return ids[0, len(prompt) :].tolist()


def expected_rows(model, inputs, cache):
    return [plain_loop(model, prompt_of(inputs, row), cache.select([row])) for row in range(2)]


@pytest.fixture(scope="module")
def expected(model, inputs, cache):
    return expected_rows(model, inputs, cache)


def generate(model, inputs, cache, expected, **options):
    """Rows as written; past the end of an expected row they are padding."""
    out = model.generate(**inputs, context_cache=cache, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    rows = zip(out[:, inputs["input_ids"].shape[1] :].tolist(), expected, strict=True)
    return [written[: len(row)] for written, row in rows]


def test_greedy_left_padded_batch(model, inputs, cache, expected):
    assert generate(model, inputs, cache, expected) == expected
    assert generate(model, inputs, None, expected) != expected
    assert len({token for row in expected for token in row}) > NEW_TOKENS


@pytest.mark.parametrize("groups", [[[1], [1]], [[0, 1], [0, 1]]], ids=["one_document", "joined"])
def test_shared_context(model, inputs, cache, groups):
    shared = cache.join(groups)
    assert model.project_context(shared).keys[0].shape[0] == shared.lengths[0]
    expected = expected_rows(model, inputs, shared)
    assert generate(model, inputs, shared, expected) == expected


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantized_cache(model, inputs, cache, dtype):
    small = cache.quantize(dtype)
    expected = expected_rows(model, inputs, small)
    assert generate(model, inputs, small, expected) == expected


def test_chunked_prefill(model, inputs, cache, expected):
    assert generate(model, inputs, cache, expected, prefill_chunk_size=8) == expected


def test_static_cache(model, inputs, cache, expected):
    options = {"cache_implementation": "static", "disable_compile": True}
    assert generate(model, inputs, cache, expected, **options) == expected


def test_static_cache_compiled(model, inputs, cache, expected):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    assert generate(model, inputs, cache, expected, **options) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch._dynamo.reset()


def test_drafts(base, model, inputs, cache, expected):
    """Drafts of a plain Llama that reads no context, of the prompt, and of the context's own text."""
    for row in range(2):
        one = {"input_ids": prompt_of(inputs, row)[None]}
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        drafts = {"assistant_model": base}, {"prompt_lookup_num_tokens": 3}, {"context_lookup_num_tokens": 6}
        for draft in drafts:
            got = generate(model, one, cache.select([row]), expected[row : row + 1], **draft)
            assert got == expected[row : row + 1], draft


def test_several_turns_on_one_projected_context(model, inputs, cache):
    row = cache.select([0])
    projected, past = model.project_context(row), DynamicCache(config=model.config)
    ids = prompt_of(inputs, 0)
    for _ in range(2):
        seen = past.get_seq_length()
        mask = torch.ones_like(ids)[None]
        options = {"context_cache": projected, "past_key_values": past, "max_new_tokens": 6, "do_sample": False}
        out = model.generate(ids[None], attention_mask=mask, **options)[0]
        assert out[len(ids) :].tolist() == plain_loop(model, ids, row, 6)
        ids = torch.cat([out, prompt_of(inputs, 1)])
    # the second turn read the first from the key-value cache
    assert seen > len(prompt_of(inputs, 0))


def test_sampling(model, inputs, cache):
    prompt, row = prompt_of(inputs, 1), cache.select([1])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(3)
    out = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], context_cache=row, **options)
    torch.manual_seed(3)
    sampled = plain_loop(model, prompt, row, choose=lambda logits: torch.multinomial((logits / 1.3).softmax(-1), 1)[0])
    assert out[0, len(prompt) :].tolist() == sampled


def test_beam_search(model, inputs, cache):
    width, num_beams, steps = inputs["input_ids"].shape[1], 3, 6
    options = {"min_new_tokens": steps, "max_new_tokens": steps, "num_beams": num_beams, "do_sample": False}
    out = model.generate(**inputs, context_cache=cache, **options)
    end = model.generation_config.eos_token_id
    for row in range(2):
        prompt = prompt_of(inputs, row).tolist()
        beams = [(0.0, prompt)]
        for _ in range(steps):
            with torch.no_grad():
                batch = torch.tensor([ids for _, ids in beams])
                context = cache.select([row] * len(beams))
                logits = model(batch, context_cache=context, use_cache=False).logits[:, -1].float()
            log_probabilities = logits.log_softmax(-1)
            log_probabilities[:, end] = -torch.inf
            values, tokens = log_probabilities.topk(num_beams)
            grown = [
                (score + float(value), [*ids, int(token)])
                for (score, ids), row_values, row_tokens in zip(beams, values, tokens, strict=True)
                for value, token in zip(row_values, row_tokens, strict=True)
            ]
            beams = sorted(grown, reverse=True)[:num_beams]
        assert out[row, width:].tolist() == beams[0][1][len(prompt) :]
