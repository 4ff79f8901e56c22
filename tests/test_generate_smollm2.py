"""The main decoding modes on a real model: SmolLM2-135M equals a plain loop, token by token."""

import pytest
import torch
from transformers import AutoTokenizer, CompileConfig

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
def model(smollm2_folder):
    model = XCLlamaForCausalLM.from_decoder(
        smollm2_folder, dtype=torch.float32, context_layer=15, cross_attention_layers=[14, 16, 18, 20, 22, 24, 26, 28]
    )
    return model.eval()


@pytest.fixture(scope="module")
def processor(model):
    return XCLlamaProcessor(AutoTokenizer.from_pretrained(model.config.base_model_name_or_path))


@pytest.fixture(scope="module")
def cache(model, processor):
    return model.encode_context(**processor(contexts=TEXTS, return_tensors="pt"))


@torch.no_grad()
def plain_loop(model, prompt, cache, new_tokens=NEW_TOKENS):
    ids, ends = prompt[None], model.generation_config.eos_token_id
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids, context_cache=cache, use_cache=False).logits[:, -1:].argmax(-1)], dim=-1)
        if int(ids[0, -1]) == ends:
            break
    return ids[0, len(prompt) :].tolist()


def check(model, processor, cache, **options):
    inputs = processor(text=QUESTIONS, return_tensors="pt")
    out = model.generate(**inputs, context_cache=cache, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    for row in range(2):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        expected = plain_loop(model, prompt, cache.select([row]))
        assert out[row, inputs["input_ids"].shape[1] :].tolist()[: len(expected)] == expected
    return inputs, out


def test_greedy_left_padded_batch(model, processor, cache):
    inputs, out = check(model, processor, cache)
    assert inputs["attention_mask"].min() == 0
    bare = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert not torch.equal(bare, out)


def test_shared_context(model, processor, cache):
    projected = model.project_context(cache.select([1, 1]))
    assert projected.keys[0].shape[0] == cache.lengths[1]
    check(model, processor, cache.select([1, 1]))
    check(model, processor, cache.join([[0, 1], [0, 1]]))


def test_static_cache(model, processor, cache):
    check(model, processor, cache, cache_implementation="static", disable_compile=True)


def test_static_cache_compiled(model, processor, cache):
    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    check(model, processor, cache, cache_implementation="static", compile_config=config)
    torch._dynamo.reset()


def test_beam_search(model, processor, cache):
    inputs = processor(text=QUESTIONS, return_tensors="pt")
    width, num_beams, steps = inputs["input_ids"].shape[1], 3, 6
    options = {"min_new_tokens": steps, "max_new_tokens": steps, "num_beams": num_beams, "do_sample": False}
    out = model.generate(**inputs, context_cache=cache, **options)
    end = model.generation_config.eos_token_id
    for row in range(2):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
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
