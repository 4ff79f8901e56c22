"""What a recipe would train, its memory and its steps, without loading weights or data."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_xcllama import XCLlamaForCausalLM
from modeling_xcllama.checkpoints import find_model
from modeling_xcllama.modeling_xcllama import config_from_decoder
from xcllama.costs import cache_bytes
from xcllama.training.build import encoder_options, parameter_counts, train_encoder_layers
from xcllama.training.recipe import Recipe

# published shape of a gated model, so that its recipe can be planned without access
_KNOWN_SHAPES: dict[str, dict[str, int]] = {
    "meta-llama/Llama-2-7b-chat-hf": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    }
}


def plan(recipe: Recipe) -> dict[str, Any]:
    """Figures of a recipe: parameters, bytes, steps.

    Returns:
        `parameters` (trained, frozen), `bytes` (weights, gradients, optimizer, exported, one token of the cache),
        `steps`, `questions_per_step`, `questions`.
    """
    with torch.device("meta"):
        model = _meta_model(recipe)
    counts = parameter_counts(model)
    width = 2 if recipe.optimization.precision == "bf16" else 4
    optimization = recipe.optimization
    questions = optimization.passages_per_step * optimization.questions_per_passage
    bytes_needed = {
        "frozen_weights": counts["frozen"] * width,
        "trained_weights": counts["trained"] * 4,
        "gradients": counts["trained"] * 4,
        "optimizer": counts["trained"] * 8,
        "exported": counts["trained"] * 2,
    }
    bytes_needed["total_without_activations"] = sum(bytes_needed.values()) - bytes_needed["exported"]
    if recipe.method == "cross_attention":
        bytes_needed["context_cache_per_token"] = round(cache_bytes(model.config))
    return {
        "recipe": recipe.name,
        "digest": recipe.digest,
        "parameters": counts,
        "bytes": bytes_needed,
        "steps": optimization.steps,
        "warmup_steps": max(1, round(optimization.warmup * optimization.steps)),
        "questions_per_step": questions,
        "questions": questions * optimization.steps,
    }


def _config(name: str, **options: int):
    if name in _KNOWN_SHAPES:
        return AutoConfig.for_model("llama", **_KNOWN_SHAPES[name])
    return AutoConfig.from_pretrained(find_model(name), **options)


def _meta_model(recipe: Recipe) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_config(_config(recipe.model.base))
    if recipe.method != "cross_attention":
        from peft import LoraConfig, get_peft_model

        base.requires_grad_(False)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **recipe.model.lora))
    encoder = None
    if recipe.model.encoder is not None:
        encoder = AutoModel.from_config(_config(recipe.model.encoder, **encoder_options(recipe)))
    # from_decoder digests the weights, of which there are none here
    model = XCLlamaForCausalLM(config_from_decoder(base, encoder, recipe.model.config))
    model.freeze_base()
    if encoder is not None:
        train_encoder_layers(model, recipe.model.train_encoder)
    return model
