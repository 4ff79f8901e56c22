"""What a module really computes with: weights, adapters as they are switched, what was offloaded, settings."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# rotary embeddings whose frequencies follow the longest text seen
CHANGING_ROPE = ("dynamic", "longrope")


@dataclass
class EffectiveWeights:
    """Tensors and settings by the names that they have without adapters.

    Args:
        tensors: weights, and buffers that are saved with them.
        settings: scalars of the modules, and what buffers that are computed at construction look like.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)

    def add(self, module: nn.Module, name: str) -> None:
        """Collect `module` and all below it; an adapter that is switched off or merged is left out."""
        children = module._modules
        if "token_adapter" in children:
            self.add(children["token_adapter"], name)
        elif "original_module" in children:
            active = [adapter for adapter in active_adapters(module) if adapter in module.modules_to_save]
            self.add(module.modules_to_save[active[0]] if active else children["original_module"], name)
        elif "base_layer" in children:
            self.add(children["base_layer"], name)
            for number, adapter in enumerate(active_adapters(module)):
                self._add_adapter(module, adapter, f"{name}:adapter_{number}")
        else:
            self._add_own(module, name)
            for key, child in children.items():
                if child is not None:
                    self.add(child, f"{name}.{key}")

    def _add_own(self, module: nn.Module, name: str) -> None:
        for key, weight in module._parameters.items():
            if weight is not None:
                self.tensors[f"{name}.{key}"] = weight_of(module, key)
        self.tensors |= {f"{name}.{key}": tensor for key, tensor in saved_tensors(module).items()}
        for key, buffer in module._buffers.items():
            if buffer is None or (key == "inv_freq" and getattr(module, "rope_type", None) in CHANGING_ROPE):
                continue
            if key not in module._non_persistent_buffers_set:
                self.tensors[f"{name}.{key}"] = weight_of(module, key)
            elif buffer.is_floating_point() and not buffer.is_meta:
                # computed, so its last bits depend on the CPU; that `.to(torch.bfloat16)` rounded it must show
                rounded = buffer.to(torch.bfloat16).to(buffer.dtype).equal(buffer)
                self.settings[f"{name}.{key}"] = f"{rounded} {float(buffer.double().sum()):.3g}"
        self.settings |= {f"{name}.{key}": value for key, value in settings_of(module).items()}

    def _add_adapter(self, layer: nn.Module, adapter: str, name: str) -> None:
        own = dict(layer.named_parameters()) | dict(layer.named_buffers())
        own = {key: tensor for key, tensor in own.items() if not key.startswith("base_layer.")}
        # where no name has the adapter in it, all adapters share what is there
        named = {key: tensor for key, tensor in own.items() if adapter in key.split(".")} or own
        self.tensors |= {f"{name}.{key.replace(f'.{adapter}', '')}": tensor for key, tensor in named.items()}
        for key, values in vars(layer).items():
            if isinstance(values, dict) and isinstance(values.get(adapter), int | float):
                self.settings[f"{name}.{key}"] = values[adapter]


def effective_weights(modules: dict[str, nn.Module]) -> EffectiveWeights:
    """What `modules` compute with, by their names."""
    weights = EffectiveWeights()
    for name, module in modules.items():
        weights.add(module, name)
    return weights


def active_adapters(layer: nn.Module) -> list[str]:
    """The adapters that a forward pass of one of peft's layers computes; merged ones are in its weight already."""
    if layer.disable_adapters or getattr(layer, "merged_adapters", None):
        return []
    return list(layer.active_adapters)


def weight_of(module: nn.Module, key: str) -> Tensor:
    """A parameter or buffer of `module`; one that accelerate offloaded is mapped from where it lies."""
    tensor = getattr(module, key)
    hooks = [getattr(module, "_hf_hook", None)]
    hooks += getattr(hooks[0], "hooks", ())
    for hook in hooks if tensor.is_meta else ():
        if getattr(hook, "weights_map", None) is not None:
            return hook.weights_map[key]
    return tensor


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a quantized layer saves beside, or instead of, its parameters: scales, packed weights."""
    own = {name: weight for name, weight in module._parameters.items() if weight is not None}
    changed = type(module)._save_to_state_dict is not nn.Module._save_to_state_dict
    if not changed or any(weight.is_floating_point() or hasattr(weight, "quant_state") for weight in own.values()):
        return {}
    saved: dict[str, object] = {}
    module._save_to_state_dict(saved, "", False)
    parts = {}
    for key, value in saved.items():
        for number, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(part, Tensor) and key not in own:
                parts[f"{key}.{number}"] = part.dequantize() if part.is_quantized else part
    return parts


def settings_of(module: nn.Module) -> dict[str, object]:
    """Scalars that shape what `module` computes in evaluation, and its name where it has nothing else."""
    settings: dict[str, object] = {}
    for key, value in vars(module).items():
        if isinstance(value, float) and "drop" not in key and not isinstance(module, nn.Dropout | nn.Embedding):
            settings[key] = f"{value:.9g}"
        elif key.startswith(("is_", "relative_attention")):
            settings[key] = value
    plain = not (module._modules or module._parameters or module._buffers or isinstance(module, nn.Dropout))
    return settings | ({"type": type(module).__name__} if plain else {})
