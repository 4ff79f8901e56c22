"""The decoder inside a GGUF file as a Hugging Face folder."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert_gguf(file: Path, target: Path) -> None:
    """Write a Llama-family GGUF file (4-bit weights, say) and its tokenizer to `target`, in bfloat16 safetensors."""
    folder, name = str(file.parent), file.name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
