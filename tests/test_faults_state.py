"""No call alters another's result: modes of modules, switches of the process and kept tensors stay as they were."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_processor import word_tokenizer
from transformers import BertConfig, BertModel

from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor

IDS = torch.arange(3, 14)[None]


@pytest.fixture
def encoder() -> BertModel:
    """With dropout, on its outputs and in its attention."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=97, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, **sizes))


def modes(model: torch.nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_encoding_in_train_mode(tiny_base, make_model, encoder, attention):
    """It drops nothing, and no module's mode changes, not even for a moment."""
    encoder.set_attn_implementation(attention)
    model = make_model(tiny_base, encoder=encoder)
    exact = model.eval().encode_context(IDS).states["hidden"]
    seen = []
    for layer in encoder.encoder.layer:
        layer.register_forward_hook(lambda module, *_: seen.append(module.training))
    for training in (True, False):
        model.train()
        model.model.encoder.train(training)
        model.model.layers[1].eval()
        before = modes(model)
        torch.testing.assert_close(model.encode_context(IDS).states["hidden"], exact)
        assert modes(model) == before
    assert seen == [True, True, False, False]
    # what trains the encoder still drops
    model.model.encoder.train()
    assert not torch.allclose(model.model._encode(IDS, None).states["hidden"], exact, atol=1e-3)


def test_attention_dropout_of_a_decoder(make_model):
    from conftest import tiny_llama

    model = make_model(tiny_llama(attention_dropout=0.5))
    exact = model.eval().encode_context(IDS).states["hidden"]
    torch.testing.assert_close(model.train().encode_context(IDS).states["hidden"], exact)


def test_what_cannot_be_switched_by_a_thread_is_refused(tiny_base, make_model, encoder):
    model = make_model(tiny_base, encoder=encoder)
    model.train()
    encoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"leaves out parts at random.*call `model.eval\(\)`"):
        model.encode_context(IDS)
    encoder.config._attn_implementation = "sdpa"
    encoder.encoder.layerdrop = 0.5
    with pytest.raises(ValueError, match="leaves out parts at random"):
        model.encode_context(IDS)
    model.eval().encode_context(IDS)


def test_errors_leave_the_mode_alone(tiny_model):
    tiny_model.train()
    with pytest.raises(ValueError, match="must lie in"):
        tiny_model.encode_context(IDS + 1000)
    assert all(modes(tiny_model).values())


@pytest.mark.parametrize("fields", [{}, {"cross_attention_share_key_value": True}], ids=["hidden", "condensed"])
def test_what_inference_mode_made_can_be_trained_on(tiny_base, fields):
    with torch.inference_mode():
        model = XCLlamaForCausalLM.from_decoder(tiny_base, **fields)
        cache = model.encode_context(IDS).join([[0], []])
        projected = model.project_context(cache)
        model(IDS.expand(2, -1), context_cache=projected)
        model.generate(IDS.expand(2, -1), context_cache=cache, max_new_tokens=2)
    assert not any(state.is_inference() for state in (*cache.states.values(), *projected.keys, *projected.values))
    ids = IDS.expand(2, -1)
    model.train()
    for context in (cache, projected):
        model.zero_grad()
        model(ids, context_cache=context, labels=ids).loss.backward()
        assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for _, weight in model.added_parameters())


SWITCHES = {
    "oneDNN": lambda: torch.backends.mkldnn.enabled,
    "threads": torch.get_num_threads,
    "default dtype": torch.get_default_dtype,
    "random numbers": lambda: torch.get_rng_state().sum().item(),
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "precision": torch.get_float32_matmul_precision,
}


def test_no_switch_of_the_process_is_turned(tiny_model):
    """Neither by a call nor in the middle of one: a watcher in every layer looks."""
    model, seen = tiny_model.bfloat16(), []
    before = {name: read() for name, read in SWITCHES.items()}
    for module in (*model.model.layers, *model.model.cross_attention_blocks, model.lm_head):
        module.register_forward_hook(lambda *_: seen.append({name: read() for name, read in SWITCHES.items()}))
    cache = model.encode_context(IDS)
    model.generate(IDS[:, :3], context_cache=cache, max_new_tokens=3, do_sample=False)
    model(IDS, context_cache=model.project_context(cache))
    assert len(seen) > 20
    assert all(one == before for one in seen)


def test_eight_threads(tiny_base, make_model, encoder):
    """Generating, encoding and training on one model at once: each result is the one that it gives alone."""
    model = make_model(tiny_base, encoder=encoder).train()
    prompts = [torch.randint(3, 97, (1, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    texts = [torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(9 + seed)) for seed in range(4)]
    caches = [model.encode_context(ids) for ids in texts]

    def generated(number: int) -> torch.Tensor:
        cache = caches[number].select([number % 2])
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        return model.generate(prompts[number], context_cache=cache, **options)

    def gradient(number: int) -> torch.Tensor:
        ids = prompts[number]
        loss = model(ids, context_cache=caches[number].select([0]), labels=ids).loss
        weights = [weight for _, weight in model.added_parameters() if weight.requires_grad]
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])

    def encoded(number: int) -> torch.Tensor:
        return model.encode_context(texts[number]).states["hidden"]

    def dropped(number: int) -> torch.Tensor:
        """What training the encoder computes: never without dropout."""
        states = model.model._encode(texts[number], None).states["hidden"]
        return torch.tensor(float((states - caches[number].states["hidden"]).abs().max() > 1e-3))

    jobs = [(job, number) for _ in range(6) for job in (generated, encoded, gradient, dropped) for number in range(4)]
    alone = {(job, number): job(number) for job, number in set(jobs)}
    assert all(alone[dropped, number] for number in range(4))
    start = threading.Barrier(8)

    def run(share: int) -> list[str]:
        start.wait(60)
        own = jobs[share::8]
        return [
            f"{job.__name__} {number}"
            for job, number in own
            if not torch.allclose(job(number).float(), alone[job, number].float(), atol=1e-5)
        ]

    with ThreadPoolExecutor(8) as pool:
        wrong = [found for share in pool.map(run, range(8)) for found in share]
    assert wrong == []
    assert all(modes(model).values())


def test_threads_share_a_tokenizer():
    """A fast tokenizer keeps the truncation of its last call: no other thread's text is cut by it."""
    tokenizer = word_tokenizer("a b c")
    cutting, whole = (XCLlamaProcessor(tokenizer, context_max_length=length) for length in (2, 1000))
    text = "a b c " * 60

    def run(share: int) -> set[int]:
        if share % 2:
            return {len(cutting(contexts=[text], truncation=True)["context_input_ids"][0]) for _ in range(150)}
        return {len(whole(contexts=[text, "a"])["context_input_ids"][0]) for _ in range(150)}

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(8))) == [{180}, {2}] * 4
