"""The model that a command is told to use: a folder of added weights, a whole model's folder, or a Hub id."""

from pathlib import Path

import torch

from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor
from modeling_xcllama.checkpoints import is_added_weights, load_checkpoint


def load_model(name: str | Path) -> tuple[XCLlamaForCausalLM, XCLlamaProcessor]:
    """Model and processor, with the code of this package: nothing that a repository brings is run.

    Raises:
        ValueError: a folder that is no model.
        OSError: no such folder or repository.
    """
    if is_added_weights(name):
        return load_checkpoint(name)
    placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model = XCLlamaForCausalLM.from_pretrained(name, dtype="auto", **placed)
    return model.eval(), XCLlamaProcessor.from_pretrained(name)
