"""Heads that copy are found: by their scores on a real decoder, and never on one whose attention cannot see them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from xcllama.training.copy_heads import copy_scores, copying_layers


def test_scores_are_shares_of_attention(tiny_base):
    tiny_base.set_attn_implementation("eager")
    scores = copy_scores(tiny_base, length=12)
    for name in ("copying", "previous_token"):
        values = torch.tensor(scores[name])
        assert values.shape == (4, 4)
        assert (values >= 0).all()
        assert (values <= 1).all()


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
