"""Recipes: what is accepted, what is refused and how, and the schedule."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from xcllama.training.dry_run import plan
from xcllama.training.loop import learning_rate_factor
from xcllama.training.recipe import OptimizationSection, load_recipe, recipe_from_dict

RECIPES = sorted((Path(__file__).parent.parent / "xcllama" / "training" / "recipes").glob("*.yaml"))


def values(**changes) -> dict:
    """A small valid recipe as plain values, with `changes` by dotted name."""
    recipe = {
        "name": "tiny",
        "model": {"base": "SmolLM2-135M-Instruct"},
        "data": {"sources": {"drop": 1}, "tasks": {"answer": 1}},
        "optimization": {"steps": 4},
    }
    for path, value in changes.items():
        *parents, name = path.split("__")
        section = recipe
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_files_load_and_survive_a_round_trip(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe_from_dict(recipe.to_dict()) == recipe


def test_no_recipe_trains_on_the_evaluation_sample_or_on_biomedical_questions():
    for path in RECIPES:
        assert not {"squad_sample", "biomedical"} & set(load_recipe(path).data.sources)


def test_digest_covers_what_decides_the_weights_and_nothing_else():
    recipe = recipe_from_dict(values())
    assert recipe_from_dict(values(run__save_steps=7, description="other words")).digest == recipe.digest
    for change in ({"seed": 1}, {"optimization__learning_rate": 2e-3}, {"model__config": {"context_layer": 2}}):
        assert recipe_from_dict(values(**change)).digest != recipe.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method.*cross_attention.*magic"),
        ({"speed": 1}, "no field 'speed'"),
        ({"optimization__stepz": 1}, "recipe.optimization.*no field 'stepz'"),
        ({"optimization__steps": 0}, "optimization.steps.*greater than or equal to 1, got 0"),
        ({"optimization__steps": "many"}, "optimization.steps.*integer, got 'many'"),
        ({"optimization__steps": True}, "steps.*integer, got True"),
        ({"optimization__learning_rate": "fast"}, "learning_rate.*number.*'fast'"),
        ({"optimization__learning_rate": -1}, "learning_rate.*greater than 0, got -1"),
        ({"optimization__learning_rate": float("nan")}, "learning_rate.*finite.*nan"),
        ({"optimization__context_dropout": 1.0}, "context_dropout.*less than 1, got 1.0"),
        ({"optimization__precision": "fp8"}, "precision.*bf16.*fp8"),
        ({"optimization__betas": 0.9}, "betas.*tuple, got 0.9"),
        ({"data__tasks": {"poetry": 1}}, "tasks.*cloze.*'poetry'"),
        ({"data__tasks": {"answer": 0}}, "tasks.*above 0"),
        ({"data__sources": {}}, "sources.*above 0"),
        ({"data__sources": {"squad_sample": 1}}, "squad_sample.*evaluation only"),
        ({"model__train_encoder": True}, "train_encoder.*encoder"),
        ({"model__start_from": "runs/x", "model__least_squares_passages": 8}, "start_from.*least_squares_passages"),
        ({"method": "lora_prompt", "distillation": {"weight": 1}}, "distillation.*cross_attention"),
        ({"optimization__start_share": 0.5}, "start_share.*0.5.*needs `model.start_from`"),
        ({"optimization__start_share": 1.0}, "start_share.*less than 1, got 1.0"),
        ({"optimization__span_loss": 0.1}, "span_layers.*got \\[\\]"),
        ({"optimization__span_loss": 0.1, "optimization__span_layers": [7]}, "span_layers.*got \\[7\\]"),
        ({"model": "SmolLM2"}, "recipe.model.*dictionary.*'SmolLM2'"),
    ],
)
def test_bad_recipes_name_the_rule_and_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_dict(values(**changes))


def test_every_fault_is_told_and_nothing_changes_later():
    with pytest.raises(ValueError, match="optimization.steps`.*\n.*precision`.*fp8") as error:
        recipe_from_dict(values(optimization__steps=0, optimization__precision="fp8"))
    assert type(error.value) is ValueError
    with pytest.raises(AttributeError, match="cannot assign to field 'steps'"):
        recipe_from_dict(values()).optimization.steps = 3
    assert recipe_from_dict(values(optimization__learning_rate="1e-3")).optimization.learning_rate == 1e-3


def test_missing_fields_are_named():
    recipe = values()
    del recipe["optimization"]["steps"]
    with pytest.raises(ValueError, match="recipe.optimization.*lacks steps"):
        recipe_from_dict(recipe)


def test_missing_file_lists_the_recipes(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*xc-smollm2-135m"):
        load_recipe(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ValueError, match="no valid YAML"):
        load_recipe(broken)


@given(
    steps=st.integers(1, 500),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
)
def test_learning_rate_rises_then_never_rises_again(steps, warmup, schedule):
    section = OptimizationSection(steps=steps, warmup=warmup, schedule=schedule)
    factors = [learning_rate_factor(step, section) for step in range(steps)]
    peak = max(1, round(warmup * steps)) - 1
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_dry_run_counts_the_published_model():
    figures = plan(load_recipe(next(path for path in RECIPES if path.stem == "paper-llama2-7b")))
    # q and o 4096 x 1024, k and v alike, SwiGLU 3 x 4096 x 4096, two LayerNorms: four blocks
    block = 4 * 4096 * 1024 + 3 * 4096 * 4096 + 4 * 4096
    assert figures["parameters"] == {"trained": 4 * block, "frozen": 6_738_415_616}
    assert figures["bytes"]["context_cache_per_token"] == 8192
    assert figures["questions"] == 256 * 40_000


@pytest.mark.parametrize(
    ("name", "cache"), [("xc-smollm2-135m", 1152), ("xc-smollm2-135m-condensed", 768), ("xc-enc-minilm", 768)]
)
def test_dry_run_of_the_small_checkpoints_fits_the_limit(smollm2_folder, minilm_folder, name, cache):
    figures = plan(load_recipe(next(path for path in RECIPES if path.stem == name)))
    assert figures["bytes"]["context_cache_per_token"] == cache
    assert figures["bytes"]["exported"] <= 25_000_000
    assert figures["parameters"]["frozen"] >= 134_515_008


def test_recipe_files_hold_every_field_by_its_name():
    for path in RECIPES:
        assert set(yaml.safe_load(path.read_text())) - {"extends"} <= set(load_recipe(path).to_dict())


def test_recipes_that_extend_each_other_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(ValueError, match=r"circle: a.yaml -> b.yaml -> a.yaml"):
        load_recipe(tmp_path / "a.yaml")


def test_a_recipe_that_extends_another_says_what_differs(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(values(seed=3, data__tasks={"answer": 1, "cloze": 2})))
    changes = "extends: base.yaml\nname: next\ndata: {tasks: {cloze: 1}}\noptimization: {learning_rate: 2e-3}\n"
    (tmp_path / "next.yaml").write_text(changes)
    merged = values(
        name="next", seed=3, data__tasks={"cloze": 1}, optimization__steps=4, optimization__learning_rate=2e-3
    )
    assert load_recipe(tmp_path / "next.yaml") == recipe_from_dict(merged)
    (tmp_path / "next.yaml").write_text("extends: nowhere.yaml\nname: next\n")
    with pytest.raises(ValueError, match="No recipe file.*nowhere"):
        load_recipe(tmp_path / "next.yaml")
