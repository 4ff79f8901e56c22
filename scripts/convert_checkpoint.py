"""Turn a checkpoint of the original XC-Cache code into a folder that the Auto classes load.

    python scripts/convert_checkpoint.py FOLDER OUT

FOLDER: config.json (Llama fields and the original's cross_attn_* fields) and model.safetensors, its shards, or
pytorch_model.bin (read with weights_only).
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig

from modeling_xcllama import XCLlamaConfig, XCLlamaForCausalLM, XCLlamaProcessor

# the original's name of a weight, inside one block -> ours
BLOCK_NAMES = {
    "ln_1": "cross_attention_blocks.{}.input_norm",
    "crossattention.q_proj": "cross_attention_blocks.{}.q_proj",
    "crossattention.o_proj": "cross_attention_blocks.{}.o_proj",
    "crossattention.k_proj": "context_projections.{}.k_proj",
    "crossattention.v_proj": "context_projections.{}.v_proj",
    "ln_2": "cross_attention_blocks.{}.mlp_norm",
    "mlp.gate_proj": "cross_attention_blocks.{}.mlp.gate_proj",
    "mlp.up_proj": "cross_attention_blocks.{}.mlp.up_proj",
    "mlp.down_proj": "cross_attention_blocks.{}.mlp.down_proj",
}


def convert_config(original: dict) -> XCLlamaConfig:
    """The config of the converted model.

    Raises:
        ValueError: `cross_attn_skip_connections`, or blocks before layer 0, which we cannot express.
    """
    for field in ("cross_attn_skip_connections", "cross_attn_shared_projections"):
        if original.get(field):
            raise ValueError(f"`{field}` is true, and this model has no such connection; it cannot be converted.")
    count, stride = original["n_cross_attn_layers"], original["cross_attn_layers_stride"]
    # counted from the top; a block before its layer is a block after the layer below
    shift = 0 if original["cross_attn_final_layer"] else 1
    last = original["num_hidden_layers"] - 1
    layers = sorted(last - shift - index * stride for index in range(count))
    if layers[0] < 0:
        raise ValueError(f"a cross-attention block would stand before layer 0: layers {layers}.")
    hidden, heads = original["cross_attn_hidden_size"], original["cross_attn_num_attention_heads"]
    fields = LlamaConfig.__dataclass_fields__
    llama = {key: original[key] for key in original if key in fields or key in ("rope_theta", "rope_scaling")}
    return XCLlamaConfig(
        **llama,
        cross_attention_layers=layers,
        cross_attention_hidden_size=hidden,
        cross_attention_num_heads=heads,
        cross_attention_num_key_value_heads=original.get("cross_attn_num_key_value_heads") or heads,
        cross_attention_intermediate_size=4 * hidden,
        cross_attention_norm="layer_norm",
        cross_attention_context_norm=False,
        cross_attention_rope=True,
        cross_attention_gate=None,
        cross_attention_share_weights=original["cross_attn_shared_weights"],
        cross_attention_bias=bool(original.get("cross_attn_attention_bias")),
    )


def convert_weights(weights: dict[str, torch.Tensor], config: XCLlamaConfig) -> dict[str, torch.Tensor]:
    """Our names for the original's weights.

    Raises:
        ValueError: a weight without a place in our model.
    """
    prefix = "cross_attn_layers."
    numbers = sorted({int(name.split(".")[1]) for name in weights if name.startswith(prefix)})
    # the original numbers a block by its decoder layer, or writes one block where all share it
    position = {number: min(index, len(config.cross_attention_layers) - 1) for index, number in enumerate(numbers)}
    converted = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight":
            converted[name] = tensor
        elif name.startswith("transformer."):
            converted["model." + name.removeprefix("transformer.")] = tensor
        elif name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            module, _, kind = rest.rpartition(".")
            if module not in BLOCK_NAMES:
                raise ValueError(f"`{name}` has no place in the converted model.")
            block = 0 if config.cross_attention_share_weights else position[int(number)]
            converted[f"model.{BLOCK_NAMES[module].format(block)}.{kind}"] = tensor
        elif not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"`{name}` has no place in the converted model.")
    return converted


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint folder; nothing is unpickled.

    Raises:
        FileNotFoundError: no weights in `folder`.
    """
    if files := sorted(folder.glob("*.safetensors")):
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    if files := sorted(folder.glob("pytorch_model*.bin")):
        loaded = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        return {name: tensor for part in loaded for name, tensor in part.items()}
    raise FileNotFoundError(f"no *.safetensors and no pytorch_model*.bin in {folder}.")


def convert(folder: Path, out: Path) -> None:
    """Convert the checkpoint in `folder` into the model folder `out`.

    Raises:
        ValueError: fields or weights that cannot be converted.
    """
    config = convert_config(json.loads((folder / "config.json").read_text()))
    weights = convert_weights(read_weights(folder), config)
    model = XCLlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(f"weights missing: {missing}; without a place: {unexpected}.")
    model.to(next(iter(weights.values())).dtype).save_pretrained(out)
    if (folder / "tokenizer_config.json").exists():
        XCLlamaProcessor(AutoTokenizer.from_pretrained(folder)).save_pretrained(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        convert(arguments.folder, arguments.out)
    except KeyError as error:
        print(f"cannot convert {arguments.folder}: config.json lacks the field {error}", file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(f"cannot convert {arguments.folder}: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
