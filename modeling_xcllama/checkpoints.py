"""Folders of added weights (checkpoints/) as models: finds the base they belong to. Local, no part of Hub repos."""

import json
import os
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .configuration_xcllama import XCLlamaConfig
from .modeling_xcllama import XCLlamaForCausalLM
from .processing_xcllama import XCLlamaProcessor

# what else of a saved config the model is built with
KEPT_FIELDS = ("context_layer", "context_prefix", "context_max_length", "answer_threshold", "unanswerable_token_id")


def find_model(name_or_path: str) -> str:
    """A folder for a Hub id where one was fetched (`make models`), else the id as it is."""
    cache = Path(os.environ.get("XCLLAMA_CACHE") or Path.home() / ".cache" / "xcllama")
    local = cache / "models" / Path(name_or_path).name
    return str(local) if not Path(name_or_path).exists() and local.exists() else name_or_path


def is_added_weights(folder: str | Path) -> bool:
    """Whether `folder` holds added weights only (`save_cross_attention`), not a whole model."""
    return (Path(folder) / "cross_attention.safetensors").is_file()


def load_checkpoint(
    folder: str | Path, base: str | PreTrainedModel | None = None, **options
) -> tuple[XCLlamaForCausalLM, XCLlamaProcessor]:
    """The model that a folder of added weights belongs to, and its processor.

    Args:
        folder: what `save_cross_attention` wrote.
        base: model, folder or Hub id of the decoder; None: the one named in the config.
        options: `dtype` for the base, `attn_implementation`-like fields of the config.

    Raises:
        ValueError: the config names no base, or the weights do not fit it.
        FileNotFoundError: no added weights in `folder`.
    """
    folder = Path(folder)
    if not is_added_weights(folder):
        raise FileNotFoundError(f"no cross_attention.safetensors in {folder}.")
    saved = json.loads((folder / "config.json").read_text())
    base = base or saved.get("base_model_name_or_path")
    if base is None:
        raise ValueError(f"{folder}/config.json names no base model; pass `base`.")
    if not isinstance(base, PreTrainedModel):
        base = AutoModelForCausalLM.from_pretrained(find_model(base), dtype=options.pop("dtype", "auto"))
    encoder, sources = None, [base.config._name_or_path]
    if saved.get("encoder_config") is not None:
        sources.append(find_model(saved["encoder_name_or_path"]))
        # as many of its layers as were kept
        encoder_config = AutoConfig.for_model(**saved["encoder_config"])
        encoder = AutoModel.from_pretrained(sources[1], config=encoder_config, dtype=base.dtype)
    fields = [
        field
        for field in XCLlamaConfig.__dataclass_fields__
        if field.startswith("cross_attention_") or field in KEPT_FIELDS
    ]
    overrides = {field: saved[field] for field in fields if field in saved}
    overrides |= {"base_model_name_or_path": saved.get("base_model_name_or_path")}
    overrides |= {"encoder_name_or_path": saved.get("encoder_name_or_path")}
    model = XCLlamaForCausalLM.from_decoder(base, encoder, init="random", **(overrides | options))
    model.load_cross_attention(folder)
    tokenizers = [AutoTokenizer.from_pretrained(source) for source in sources]
    if (template := folder / "chat_template.jinja").is_file():
        # the template that the weights were trained with
        tokenizers[0].chat_template = template.read_text()
    return model.eval(), XCLlamaProcessor(*tokenizers, context_max_length=model.config.context_max_length)
