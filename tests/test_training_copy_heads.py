"""Heads that copy are found: by their scores on a real decoder, and never on one whose attention cannot see them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from xcllama.training.copy_heads import copy_scores, copying_layers


class TwoHeads:
    """One layer: a head that attends to what followed the same token before, and one that looks one token back."""

    config, device = SimpleNamespace(_attn_implementation="eager", vocab_size=500, bos_token_id=1), "cpu"

    def __call__(self, input_ids, **options):
        rows, length = input_ids.shape
        copying, previous = torch.zeros(2, rows, length, length)
        half = (length - 1) // 2
        for place in range(1, length):
            previous[:, place, place - 1] = 1
            if place > half:
                assert torch.equal(input_ids[:, place], input_ids[:, place - half])
                copying[:, place, place - half + 1] = 1
        return SimpleNamespace(attentions=(torch.stack([copying, previous], 1),))


def test_a_head_that_copies_is_told_from_one_that_looks_back():
    assert copy_scores(TwoHeads(), length=12) == {"copying": [[1.0, 0.0]], "previous_token": [[0.0, 1.0]]}


def test_the_layers_that_copy_most_come_in_their_order():
    assert copying_layers({"copying": [[0.1, 0.0], [0.9, 0.9], [0.0, 0.2], [0.5, 0.6]]}, 2) == [1, 3]


def test_smollm2_copies_in_the_layers_that_the_recipe_reads_before(smollm2_folder):
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, attn_implementation="eager").eval()
    layers = copying_layers(copy_scores(model, rows=1), 3)
    assert {17, 18} < set(layers)


def test_attention_without_weights_is_refused(tiny_base):
    tiny_base.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation='eager', the model has 'sdpa'"):
        copy_scores(tiny_base)
