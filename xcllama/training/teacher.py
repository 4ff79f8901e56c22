"""The frozen decoder that reads passages in its prompt: what a distilled model follows, where its adapters start."""

import logging
from itertools import accumulate
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_xcllama import XCLlamaForCausalLM
from modeling_xcllama.checkpoints import find_model
from modeling_xcllama.context_cache import ProjectedContext
from modeling_xcllama.context_encoding import pad_right
from modeling_xcllama.context_projection import ReadingPlan
from modeling_xcllama.cross_attention import resolve_implementation
from modeling_xcllama.least_squares import fit_least_squares
from xcllama.progress import tracked
from xcllama.training.recipe import Recipe

logger = logging.getLogger(__name__)


def load_prompt_reader(recipe: Recipe, adapter: str | None) -> PreTrainedModel:
    """The recipe's base in float32 with `adapter` merged, frozen.

    Raises:
        ValueError: `adapter` is no folder of an adapter.
    """
    base = AutoModelForCausalLM.from_pretrained(find_model(recipe.model.base), dtype=torch.float32)
    if adapter is not None:
        base = _with_adapter(base, adapter).merge_and_unload()
    return base.requires_grad_(False).eval()


def _with_adapter(base: PreTrainedModel, adapter: str) -> PeftModel:
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(f"an adapter is a folder with an adapter_config.json, got {adapter!r}.")
    return PeftModel.from_pretrained(base, adapter)


class Teacher:
    """Hidden states of a prompt reader on the rows of a batch: the student's own tokens, the passage elsewhere.

    It reads jointly, in every layer, its own keys and values of the passages: to its rows they are the prompt.

    Args:
        reader: see `load_prompt_reader`.
        prefix: `context_prefix` of the student.
    """

    def __init__(self, reader: PreTrainedModel, prefix: list[int] | None):
        self.prefix = prefix or []
        self.model = XCLlamaForCausalLM.from_decoder(
            reader, init="random", cross_attention_mode="joint", context_prefix=prefix
        ).eval()
        self.model.requires_grad_(False)

    def to(self, device: torch.device) -> "Teacher":
        """The teacher on `device`."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        passages: list[Tensor],
        own: tuple[int, ...],
    ) -> tuple[Tensor, ...]:
        """`output_hidden_states` of the rows, each of which reads the passage (token ids) that it is about."""
        return self.model.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            context_cache=self.read(passages, own),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states

    @torch.no_grad()
    def read(self, passages: list[Tensor], own: tuple[int, ...]) -> ProjectedContext:
        """The decoder's own keys and values of `passages`, each behind the prefix; row i reads passage `own[i]`."""
        ids, _ = pad_right([torch.cat([ids.new_tensor(self.prefix), ids]) for ids in passages])
        past = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
        offsets = tuple(accumulate(map(len, passages), initial=0))
        plan = ReadingPlan.of(offsets, [(passage,) for passage in own])
        start = len(self.prefix)

        def packed(states: Tensor) -> Tensor:
            parts = [
                states[index, :, start : start + len(passage)].transpose(0, 1)
                for index, passage in enumerate(passages)
            ]
            tokens = torch.cat(parts)[plan.tokens]
            return tokens if plan.repeat is None else tokens[plan.repeat]

        keys, values = zip(*((packed(layer.keys), packed(layer.values)) for layer in past.layers), strict=True)
        projections = self.model.model.context_projections
        implementation = resolve_implementation(self.model.config.cross_attn_implementation, keys[0].device)
        return ProjectedContext(keys, values, plan.rows, None, projections, implementation)


def start_in_closed_form(recipe: Recipe, model: XCLlamaForCausalLM, sequences: list[list[int]]) -> None:
    """Set the context projections by least squares on `sequences` of token ids, and the adapters from a LoRA."""
    adapter = recipe.model.adapter_from
    reader = None if adapter is None else load_prompt_reader(recipe, adapter).to(model.device)
    scores = fit_least_squares(model, tracked(sequences, "least squares, texts"), reader)
    logger.info("least squares, R2 by layer: %s", {layer: round(score, 3) for layer, score in scores.items()})
    if adapter is not None:
        start_adapters(model, adapter, recipe)


@torch.no_grad()
def start_adapters(model: XCLlamaForCausalLM, adapter: str, recipe: Recipe) -> None:
    """Give the context adapters the updates of a LoRA on q and v.

    Raises:
        ValueError: the adapter has another rank, or updates other projections.
    """
    base = AutoModelForCausalLM.from_pretrained(find_model(recipe.model.base), dtype=torch.float32)
    peft = _with_adapter(base, adapter)
    config = peft.peft_config["default"]
    rank = model.config.cross_attention_adapter_rank
    if config.r != rank or set(config.target_modules) != {"q_proj", "v_proj"}:
        raise ValueError(
            f"`model.adapter_from` needs a LoRA on q_proj and v_proj of rank {rank} "
            f"(`cross_attention_adapter_rank`), got {sorted(config.target_modules)} of rank {config.r}."
        )
    for ours, layer in zip(model.model.context_adapters, peft.get_base_model().model.layers, strict=True):
        linears: list[nn.Module] = [layer.self_attn.q_proj, layer.self_attn.v_proj]
        ours.down_proj.weight.copy_(torch.cat([linear.lora_A["default"].weight for linear in linears]))
        for up, linear in zip((ours.q_up_proj, ours.v_up_proj), linears, strict=True):
            up.weight.copy_(linear.lora_B["default"].weight * linear.scaling["default"])
