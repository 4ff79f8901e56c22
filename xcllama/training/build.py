"""The model of a recipe: a frozen decoder with what the recipe adds and trains."""

import logging

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor
from modeling_xcllama.checkpoints import find_model
from xcllama.training.recipe import Recipe

logger = logging.getLogger(__name__)


def load_processor(recipe: Recipe) -> XCLlamaProcessor:
    """The processor of a recipe's model, with the recipe's chat template where it has one."""
    tokenizer = AutoTokenizer.from_pretrained(find_model(recipe.model.base))
    if recipe.model.chat_template is not None:
        tokenizer.chat_template = recipe.model.chat_template
    encoder = recipe.model.encoder
    return XCLlamaProcessor(tokenizer, None if encoder is None else AutoTokenizer.from_pretrained(find_model(encoder)))


def build_model(recipe: Recipe) -> nn.Module:
    """The model of a recipe: frozen weights in the recipe's precision, trained weights in float32.

    Raises:
        ValueError: nothing is left to train.
    """
    dtype = torch.bfloat16 if recipe.optimization.precision == "bf16" else torch.float32
    torch.manual_seed(recipe.seed)
    base = AutoModelForCausalLM.from_pretrained(
        find_model(recipe.model.base), dtype=dtype, attn_implementation=recipe.model.attn_implementation
    )
    model = _cross_attention(base, recipe) if recipe.method == "cross_attention" else _lora(base, recipe)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not trained:
        raise ValueError(f"Recipe {recipe.name!r} leaves no weight to train; see `model.config` and `model.lora`.")
    for weight in trained:
        weight.data = weight.data.float()
    if recipe.optimization.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _cross_attention(base: PreTrainedModel, recipe: Recipe) -> XCLlamaForCausalLM:
    encoder = None
    if recipe.model.encoder is not None:
        name = find_model(recipe.model.encoder)
        encoder = AutoModel.from_pretrained(name, dtype=base.dtype, **encoder_options(recipe))
    model = XCLlamaForCausalLM.from_decoder(base, encoder=encoder, init=recipe.model.init, **recipe.model.config)
    if encoder is not None:
        train_encoder_layers(model, recipe.model.train_encoder)
    return model


def encoder_options(recipe: Recipe) -> dict[str, int]:
    """What differs from the encoder's own config: its upper layers may be left out."""
    layers = recipe.model.encoder_layers
    return {} if layers is None else {"num_hidden_layers": layers}


def train_encoder_layers(model: XCLlamaForCausalLM, train: bool) -> None:
    """Train the layers of a separate encoder, never its embeddings."""
    for name, weight in model.model.encoder.named_parameters():
        weight.requires_grad_(train and "embed" not in name and "pooler" not in name)


def _lora(base: PreTrainedModel, recipe: Recipe) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base.requires_grad_(False)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **recipe.model.lora))


def in_frozen_precision(model: nn.Module) -> torch.autocast:
    """The context in which `model` runs: frozen weights are stored in 16 bits, trained ones in 32."""
    return torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of trained and of frozen weights."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return {"trained": trained, "frozen": sum(weight.numel() for weight in model.parameters()) - trained}
