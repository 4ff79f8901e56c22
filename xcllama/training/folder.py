"""A folder of trained weights: what is needed to read with them, and what they were made from."""

import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from modeling_xcllama.checkpoints import find_model
from modeling_xcllama.fingerprint import weights_digest
from xcllama.durable import write_json, write_text
from xcllama.provenance import versions
from xcllama.training.build import load_processor
from xcllama.training.recipe import Recipe

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets")


def write_weights(recipe: Recipe, model: nn.Module, target: Path) -> None:
    """Write the trained weights in 16 bits, config, chat template and recipe to `target`.

    The model keeps the rounded weights, in the precision that it had.
    """
    target.mkdir(parents=True, exist_ok=True)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.data = weight.data.to(torch.bfloat16)
    base_id = recipe.run.base_id or recipe.model.base
    if recipe.method == "cross_attention":
        model.config.base_model_name_or_path = base_id
        if recipe.model.encoder is not None:
            model.config.encoder_name_or_path = recipe.run.encoder_id or recipe.model.encoder
        model.save_cross_attention(target)
    else:
        model.peft_config["default"].base_model_name_or_path = base_id
        # embeddings are not trained: peft need not look the base up on the Hub to know
        model.save_pretrained(target, save_embedding_layers=False)
    for weight in trained:
        weight.data = weight.data.float()
    template = load_processor(recipe).chat_template
    if template:
        write_text(target / "chat_template.jinja", template)
    write_text(target / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))


def write_record(recipe: Recipe, model: nn.Module, target: Path, step: int, stages: list[dict[str, Any]]) -> None:
    """Write training.json: the run, the base that the weights belong to, and versions."""
    origin = Path(find_model(recipe.model.base)) / "SOURCE"
    write_json(
        target / "training.json",
        {
            "recipe": recipe.name,
            "digest": recipe.digest,
            "seed": recipe.seed,
            "step": step,
            "stages": stages,
            "base": recipe.model.base,
            "base_source": origin.read_text().strip() if origin.is_file() else recipe.model.base,
            "base_digest": _base_digest(recipe, model),
            "added_digest": model.added_digest() if recipe.method == "cross_attention" else None,
            "sources": sorted(recipe.data.sources),
            "versions": {"python": platform.python_version()} | versions(PACKAGES),
        },
    )


def _base_digest(recipe: Recipe, model: nn.Module) -> str:
    """Digest of the frozen decoder's weights, under the decoder's own names."""
    if recipe.method == "cross_attention":
        return model.base_digest()
    named = [(name.replace(".base_layer", ""), weight) for name, weight in model.get_base_model().named_parameters()]
    return weights_digest(((name, weight) for name, weight in named if ".lora_" not in name), sampled=True)
