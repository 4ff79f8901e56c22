"""Folders of added weights (checkpoints/): the base that they belong to is found, and model and processor are made."""

import os
from dataclasses import fields
from pathlib import Path

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_xcllama import XCLlamaConfig

WEIGHTS_NAME = "cross_attention.safetensors"
# fields that the base or the code gives, and those that are worked out anew
OTHER_FIELDS = {"sliding_window", "encoder_config", "template_version"}
OTHER_FIELDS |= {"context_fingerprint", "base_model_digest"}
# what the Auto classes and pipelines pass on for repositories: a folder has no use for it
REPOSITORY_OPTIONS = (
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "code_revision",
    "revision",
    "trust_remote_code",
)
# the code of a folder of added weights: a file of three lines that takes the classes from the installed package
AUTO_FILE = "xcllama_classes"
AUTO_CLASSES = {
    "AutoConfig": "XCLlamaConfig",
    "AutoModelForCausalLM": "XCLlamaForCausalLM",
    "AutoProcessor": "XCLlamaProcessor",
}
AUTO_CODE = '''"""Added weights: their code is in the installed package xcllama, their base is named in config.json."""

from xcllama.models import ContextQuestionAnsweringPipeline, XCLlamaConfig, XCLlamaForCausalLM, XCLlamaProcessor

__all__ = ["ContextQuestionAnsweringPipeline", "XCLlamaConfig", "XCLlamaForCausalLM", "XCLlamaProcessor"]
'''

# what `make models` puts into the cache folder; of another owner the name alone would be the same
FETCHED = ("HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2")


def find_model(name_or_path: str) -> str:
    """A folder for one of `FETCHED`, with or without its owner, where it was fetched; else the id or path as it is."""
    cache = Path(os.environ.get("XCLLAMA_CACHE") or Path.home() / ".cache" / "xcllama")
    if name_or_path in {name for repo_id in FETCHED for name in (repo_id, repo_id.rpartition("/")[2])}:
        local = cache / "models" / name_or_path.rpartition("/")[2]
        if not Path(name_or_path).exists() and local.exists():
            return str(local)
    return name_or_path


def is_added_weights(folder: str | os.PathLike) -> bool:
    """Whether `folder` holds added weights only (`save_cross_attention`), not a whole model."""
    return (Path(folder) / WEIGHTS_NAME).is_file()


def from_added_weights(
    model_class: type,
    folder: str | os.PathLike,
    base: str | PreTrainedModel | None = None,
    config: XCLlamaConfig | None = None,
    dtype="auto",
    **options,
) -> PreTrainedModel:
    """The model that a folder of added weights belongs to, for `XCLlamaForCausalLM.from_pretrained`.

    Args:
        base: model, folder or Hub id of the decoder; None: the one named in the config.
        config: of the folder, where it is loaded already.
        dtype: for the base.
        options: fields of the config, or arguments of the base's `from_pretrained` (`device_map`, ...).

    Raises:
        ValueError: the config names no base, or the weights do not fit it.
    """
    saved = XCLlamaConfig.from_pretrained(folder) if config is None else config
    base = base or saved.base_model_name_or_path
    if base is None:
        raise ValueError(f"{folder}/config.json names no base model; pass `base`.")
    # without what is the class's alone
    own = {field.name for field in fields(XCLlamaConfig)} & set(XCLlamaConfig.__annotations__) - OTHER_FIELDS
    given = {name: value for name, value in options.items() if name not in REPOSITORY_OPTIONS}
    values = {name: given.pop(name) if name in given else getattr(saved, name) for name in sorted(own)}
    if isinstance(base, PreTrainedModel) and given:
        raise ValueError(f"the base is loaded already: leave out {', '.join(given)}.")
    if not isinstance(base, PreTrainedModel):
        # the Auto classes put this argument into the config
        chosen = {} if saved._attn_implementation is None else {"attn_implementation": saved._attn_implementation}
        base = AutoModelForCausalLM.from_pretrained(find_model(base), dtype=dtype, **chosen | given)
    encoder = None
    if saved.encoder_config is not None:
        # as many of its layers as were kept
        name = find_model(saved.encoder_name_or_path)
        encoder = AutoModel.from_pretrained(name, config=saved.encoder_config, dtype=base.dtype)
    model = model_class.from_decoder(base, encoder, init="random", **values)
    model.load_cross_attention(folder)
    return model.eval()


def added_weights_tokenizers(
    folder: str | os.PathLike, base: str | None = None
) -> tuple[XCLlamaConfig, list[PreTrainedTokenizerBase]]:
    """Config and tokenizers (the decoder's, and a separate encoder's) of a folder of added weights.

    Args:
        base: folder or Hub id of the decoder, in place of the one in the config.

    Raises:
        ValueError: the config names no base.
    """
    config = XCLlamaConfig.from_pretrained(folder)
    base = base or config.base_model_name_or_path
    if base is None:
        raise ValueError(f"{folder}/config.json names no base model, whose tokenizer is needed; pass `base`.")
    names = [base]
    names += [] if config.encoder_config is None else [config.encoder_name_or_path]
    tokenizers = [AutoTokenizer.from_pretrained(find_model(name)) for name in names]
    if (template := Path(folder) / "chat_template.jinja").is_file():
        # the template that the weights were trained with
        tokenizers[0].chat_template = template.read_text()
    return config, tokenizers
