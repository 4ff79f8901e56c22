"""The model that a script of this repository is told to use: see `xcllama.models`; unnamed, its own checkpoint."""

from pathlib import Path

from transformers import AutoTokenizer

from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor
from modeling_xcllama.checkpoints import find_model, is_added_weights
from xcllama import models

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints" / "xc-smollm2-135m"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_model(name: str | None):
    """Model and processor; without a name the repository's checkpoint, or untrained weights where it has none.

    Args:
        name: folder of added weights, folder or Hub id of a whole model (read with the code of this repository:
            nothing that it brings is run), or "untrained".
    """
    if name is None:
        name = str(CHECKPOINT) if is_added_weights(CHECKPOINT) else "untrained"
    if name == "untrained":
        print(f"no trained weights: untrained cross-attention on {BASE}")
        base = find_model(BASE)
        model = XCLlamaForCausalLM.from_decoder(base, context_layer=15, cross_attention_layers=list(range(14, 30, 2)))
        return model.eval(), XCLlamaProcessor(AutoTokenizer.from_pretrained(base))
    return models.load_for_command(name)
