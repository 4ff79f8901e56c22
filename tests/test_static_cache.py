"""Compiled decoding over a static cache: the same tokens, few graphs, nothing compiled before the first token."""

import pytest
import torch
from xcllama_kernels.launch import INTERPRETED, launch_counts

from modeling_xcllama import decoder_xcllama
from modeling_xcllama.decoding_speed import decoding_compile_config


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and counts graphs and runs."""

    def __init__(self):
        self.made = self.runs = 0

    def __deepcopy__(self, memo):
        # generate copies its options
        return self

    def __call__(self, graph, inputs):
        self.made += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def test_twenty_context_lengths_make_few_graphs(tiny_model, graphs):
    """One graph for the first length, one for all others; one more where a length of 1 is a constant."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 97, (1, 6), generator=generator)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    config = decoding_compile_config(graphs)
    for number, length in enumerate([9, 30, *range(1, 60, 3)][:20]):
        cache = tiny_model.encode_context(torch.randint(3, 97, (1, length), generator=generator))
        expected = tiny_model.generate(prompt, context_cache=cache, **options)
        got = tiny_model.generate(
            prompt, context_cache=cache, cache_implementation="static", compile_config=config, **options
        )
        assert torch.equal(got, expected)
        # the first of five tokens is not compiled
        assert graphs.runs == 4 * (number + 1)
        if number == 1:
            assert graphs.made <= 2
    assert graphs.made <= 3


@pytest.mark.parametrize("implementation", ["sdpa", "triton"])
@pytest.mark.parametrize("mode", ["block", "joint"])
def test_a_step_is_one_graph(make_llama, make_model, graphs, monkeypatch, mode, implementation):
    """`fullgraph=True`: the backend was chosen when the context was projected, what its rows need are inputs."""
    if implementation == "triton" and not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1 before triton is imported")
    base = make_llama(hidden_size=64)
    model = make_model(base, cross_attention_mode=mode, cross_attn_implementation=implementation)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 97, (3, 6), generator=generator)
    cache = model.encode_context(torch.randint(3, 97, (2, 9), generator=generator))
    contexts = [model.project_context(cache.join(rows)) for rows in ([[0], [1], []], [[1], [], [0]])]
    assert {context.implementation for context in contexts} == {implementation}
    monkeypatch.setattr(decoder_xcllama, "resolve_implementation", None)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for context in contexts:
        with torch.no_grad():
            expected = model(prompt, context_cache=context).logits
            before = launch_counts["decode_kernel"]
            got = compiled(prompt, context_cache=context).logits
        assert (launch_counts["decode_kernel"] > before) == (implementation == "triton")
        torch.testing.assert_close(got, expected)
    # with kernels, other rows on other contexts are other inputs of the same graph
    assert graphs.made == (1 if implementation == "triton" else 2)


@pytest.mark.slow
def test_inductor_writes_the_same_tokens(tiny_model, batch):
    """With the length of the context as a constant, and as a variable."""
    prompt = torch.randint(3, 97, (3, 6), generator=torch.Generator().manual_seed(0))
    compiled = {"cache_implementation": "static", "compile_config": decoding_compile_config()}
    for length in (11, 6, 9):
        cache = tiny_model.encode_context(batch["context_input_ids"][:, :length]).select([0, 1, 0])
        options = {"max_new_tokens": 12, "do_sample": False, "context_cache": cache}
        expected = tiny_model.generate(prompt, **options)
        assert torch.equal(tiny_model.generate(prompt, **options, **compiled), expected)
