"""The added modules by their names, and quantization configs of transformers that leave them whole."""

import copy

from transformers.quantizers import AutoQuantizationConfig

ADDED_PREFIXES = ("model.cross_attention_blocks.", "model.context_projections.", "model.context_adapters.")


def keep_added_modules(quantization_config):
    """A copy of a transformers quantization config (or its dict) that leaves the added modules, and the head, whole.

    Raises:
        ValueError: the method has no list of modules to leave out.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    fields = ("llm_int8_skip_modules", "modules_to_not_convert")
    field = next((name for name in fields if hasattr(quantization_config, name)), None)
    if field is None:
        raise ValueError(
            f"{type(quantization_config).__name__} cannot leave modules out: quantize the base and pass it to "
            "`XCLlamaForCausalLM.from_decoder`."
        )
    config = copy.deepcopy(quantization_config)
    added = [prefix.strip(".") for prefix in (*ADDED_PREFIXES, "model.encoder.")]
    # the bare model's names have no prefix
    added += [name.removeprefix("model.") for name in added]
    setattr(config, field, sorted({*(getattr(config, field) or ["lm_head"]), *added}))
    return config
