"""A model of another layout starts from trained blocks: exactly where that is possible, closely where it is not."""

from pathlib import Path

import pytest
import torch
from training_support import base_folder, make_recipe, rows_file

from xcllama.training.build import build_model, load_processor
from xcllama.training.following import follow
from xcllama.training.passages import read_passages
from xcllama.training.recipe import Recipe
from xcllama.training.run import run_recipe
from xcllama.training.transfer import transfer

BLOCKS = {"context_layer": 2, "cross_attention_layers": [1, 2]}


def start(recipe: Recipe):
    """A model with its processor."""
    return build_model(recipe), load_processor(recipe)


def logits(pair, text: str) -> torch.Tensor:
    """What a model answers to a fixed question on `text`."""
    model, processor = pair
    inputs = processor(text=["How many cats?"], contexts=[text], return_tensors="pt")
    return model.eval()(**inputs).logits


def texts_of(recipe: Recipe) -> list[str]:
    return [passage.text for passage in read_passages(recipe.data, recipe.seed)]


def make_source(make_recipe, related: bool):
    """Trained blocks stand-in: random ones; `related` gives the second block keys that the first one's determine."""
    source = start(make_recipe(model={"config": BLOCKS}))
    first, second = source[0].model.context_projections
    size = source[0].config.head_dim
    with torch.no_grad():
        for block in source[0].model.cross_attention_blocks:
            torch.nn.init.normal_(block.o_proj.weight, std=0.3)
            torch.nn.init.normal_(block.q_proj.weight, std=0.3)
        if related:
            second.norm.weight.copy_(first.norm.weight)
            for ours, theirs in ((second.k_proj, first.k_proj), (second.v_proj, first.v_proj)):
                ours.weight.copy_((torch.randn(size, size) @ theirs.weight.unflatten(0, (-1, size))).flatten(0, 1))
    return source


def test_shared_keys_and_values_are_exact_where_one_head_determines_the_others(make_recipe):
    source = make_source(make_recipe, related=True)
    shared = make_recipe(model={"config": BLOCKS | {"cross_attention_share_key_value": True}})
    target, texts = start(shared), texts_of(shared)
    transfer(source, target, texts)
    torch.testing.assert_close(logits(target, texts[0]), logits(source, texts[0]), rtol=1e-2, atol=1e-2)


def test_shared_keys_and_values_come_closer_than_none(make_recipe):
    source = make_source(make_recipe, related=False)
    shared = make_recipe(model={"config": BLOCKS | {"cross_attention_share_key_value": True}})
    target, texts = start(shared), texts_of(shared)
    transfer(source, target, texts)
    wanted, without = (
        logits(source, texts[0]),
        source[0](**source[1](text=["How many cats?"], return_tensors="pt")).logits,
    )
    assert (logits(target, texts[0]) - wanted).norm() < 0.7 * (without - wanted).norm()


def test_an_encoder_takes_over_keys_and_values_at_the_same_characters(make_recipe, base_folder, rows_file):
    source = make_source(make_recipe, related=False)
    config = {"cross_attention_layers": BLOCKS["cross_attention_layers"]}
    other = make_recipe(model={"config": config, "encoder": str(base_folder), "encoder_layers": 2})
    target, texts = start(other), texts_of(other)
    assert len(target[0].model.encoder.layers) == 2
    transfer(source, target, texts)
    wanted = logits(source, texts[0])
    # the encoder's states are the decoder's own, but for its final norm
    torch.testing.assert_close(logits(target, texts[0]), wanted, rtol=0.1, atol=0.05)


def test_an_encoder_learns_the_keys_and_values_of_a_trained_model(make_recipe, base_folder, tmp_path):
    source = make_source(make_recipe, related=False)
    model = {"config": {"cross_attention_layers": BLOCKS["cross_attention_layers"]}, "encoder": str(base_folder)}
    recipe = make_recipe(model=model | {"encoder_layers": 1, "train_encoder": True})
    target, texts = start(recipe), texts_of(recipe)
    before = {name: weight.clone() for name, weight in target[0].model.encoder.named_parameters()}
    first = follow(source, target, texts, 1, tmp_path)
    last = follow(source, target, texts, 60, tmp_path)
    assert last < 0.7 * first
    changed = {name for name, weight in target[0].model.encoder.named_parameters() if not weight.equal(before[name])}
    assert changed
    assert not any("embed" in name for name in changed)
    with pytest.raises(ValueError, match="follow_steps.*train_encoder"):
        make_recipe(model={"follow_steps": 3})


def test_blocks_at_other_layers_are_refused(make_recipe):
    source = start(make_recipe(model={"config": BLOCKS}))
    target = start(make_recipe(model={"config": BLOCKS | {"cross_attention_layers": [1, 3]}}))
    with pytest.raises(ValueError, match=r"cross_attention_layers.*\[1, 2\].*\[1, 3\]"):
        transfer(source, target, ["A text."])
    with pytest.raises(ValueError, match="transfer_from.*least_squares_passages"):
        make_recipe(model={"transfer_from": "checkpoints/xc"})


def test_a_recipe_starts_from_another_ones_export(make_recipe, tmp_path):
    model, processor = make_source(make_recipe, related=False)
    model.config.base_model_name_or_path = make_recipe().model.base
    model.save_cross_attention(tmp_path / "export")
    (tmp_path / "export" / "chat_template.jinja").write_text(processor.tokenizer.chat_template)
    config = BLOCKS | {"cross_attention_share_key_value": True}
    recipe = make_recipe(
        model={"config": config, "transfer_from": str(tmp_path / "export"), "least_squares_passages": 8},
        optimization={"steps": 1, "learning_rate": 1e-9},
    )
    trained = run_recipe(recipe, tmp_path / "run")
    for ours, theirs in zip(trained.model.cross_attention_blocks, model.model.cross_attention_blocks, strict=True):
        assert torch.allclose(ours.input_norm.weight, theirs.input_norm.weight)
        assert not torch.allclose(
            ours.o_proj.weight, build_model(recipe).model.cross_attention_blocks[0].o_proj.weight
        )
