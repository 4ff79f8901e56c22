"""The model that is named: a folder of added weights, a whole model's folder, or a Hub id."""

from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_xcllama import ContextQuestionAnsweringPipeline, XCLlamaConfig, XCLlamaForCausalLM, XCLlamaProcessor
from modeling_xcllama.checkpoints import find_model, is_added_weights

__all__ = [
    "ContextQuestionAnsweringPipeline",
    "XCLlamaConfig",
    "XCLlamaForCausalLM",
    "XCLlamaProcessor",
    "load_model",
]


def load_model(
    name: str | Path, base: str | PreTrainedModel | None = None, **options
) -> tuple[XCLlamaForCausalLM, XCLlamaProcessor]:
    """Model and processor, with the code of this package: nothing that a repository brings is run.

    Args:
        name: folder of added weights, folder or Hub id of a whole model; of a Hub id what `make models` fetched.
        base: of added weights: model, folder or Hub id of the decoder, in place of the one in their config.
        options: of `XCLlamaForCausalLM.from_pretrained`.

    Raises:
        ValueError: a model that reads no contexts, or a base that does not fit.
        OSError: no such folder or repository.
    """
    name = find_model(str(name))
    kind = XCLlamaConfig.get_config_dict(name)[0].get("model_type")
    if kind != XCLlamaConfig.model_type:
        raise ValueError(f"{name} is a {kind!r} model, which reads no contexts: make a reader of it (`xcllama fit`).")
    # bars of the Hub's downloads stay; those of weights being read say nothing that a user can act on
    before = logging.set_tqdm_hook(lambda factory, arguments, given: factory(*arguments, **given | {"disable": True}))
    try:
        model = XCLlamaForCausalLM.from_pretrained(name, base=base, **{"dtype": "auto"} | options)
        # a model that is given has no tokenizer
        named = base if isinstance(base, str) else None
        return model.eval(), XCLlamaProcessor.from_pretrained(name, base=named)
    finally:
        logging.set_tqdm_hook(before)


def load_for_command(name: str | Path) -> tuple[XCLlamaForCausalLM, XCLlamaProcessor]:
    """`load_model` on the accelerator, or accelerators, where there are any."""
    if not torch.cuda.is_available():
        return load_model(name)
    # added weights stand on a base that is on one device
    return load_model(name, device_map="cuda" if is_added_weights(find_model(str(name))) else "auto")
