"""Start a model of another layout from trained blocks: condensed keys and values, or those of a separate encoder.

The trained model (the source) has keys and values for each block. Its queries, outputs and gates are taken over, and

- where the encoder is another one, each projection follows the source's keys and values by ridge regression on tokens
  that end at the same character;
- where all blocks share keys and values, a shared head takes the directions of the source's keys (values) that its
  queries (outputs) weigh most over all blocks, and every block's queries and outputs are expressed in them: the
  reduced-rank approximation of the attention scores and outputs on real tokens (Eckart and Young, 1936).
"""

import logging
from bisect import bisect_left
from itertools import accumulate

import torch
from torch import Tensor, nn

from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor
from modeling_xcllama.least_squares import RidgeRegression, normalized, set_projection
from xcllama.training.build import in_frozen_precision
from xcllama.training.prompts import Prompts

logger = logging.getLogger(__name__)


@torch.no_grad()
def transfer(
    source: tuple[XCLlamaForCausalLM, XCLlamaProcessor],
    target: tuple[XCLlamaForCausalLM, XCLlamaProcessor],
    passages: list[str],
) -> None:
    """Set the added weights of the target from those of the source, by what both make of `passages`.

    Raises:
        ValueError: blocks at other layers or of other sizes, or a source whose blocks share keys and values.
    """
    old, new = source[0], target[0]
    for name in ("cross_attention_layers", "cross_attention_num_heads", "cross_attention_num_key_value_heads"):
        theirs, ours = getattr(old.config, name), getattr(new.config, name)
        if theirs != ours:
            raise ValueError(f"`model.transfer_from` has `{name}`={theirs}, the recipe {ours}; they must be equal.")
    if old.config.cross_attention_share_key_value:
        raise ValueError("`model.transfer_from` needs a checkpoint with keys and values for each block.")
    new.model.cross_attention_blocks.load_state_dict(old.model.cross_attention_blocks.state_dict())
    states, aligned = _states(source, target, passages)
    keys, values = projected(old, states)
    if new.config.cross_attention_share_key_value:
        keys, values = [_share(old, new, keys, "q_proj")], [_share(old, new, values, "o_proj")]
    for projection, key, value in zip(new.model.context_projections, keys, values, strict=True):
        # a vector that all keys share changes no attention
        wanted = torch.cat([key - key.mean(0), value], dim=1)
        sums = RidgeRegression(aligned.shape[-1], [wanted.shape[-1]])
        sums.add(normalized(projection.norm, aligned), [wanted])
        (weight,), (score,) = sums.solve()
        set_projection(projection, weight)
        logger.info("keys and values taken over with R2 %.3f", score)


def _states(source, target, passages: list[str]) -> tuple[Tensor, Tensor]:
    """States of the source and of the target, `[num_tokens, width]`, row by row for the same places of the texts."""
    ours, theirs = [], []
    for text in passages:
        states = []
        for model, processor in (source, target):
            ids = processor(contexts=[text], return_tensors="pt")["context_input_ids"].to(model.device)
            with in_frozen_precision(model):
                states.append(model.model.encode_packed(list(ids)).float().cpu())
        ours.append(states[0][places_of(source[1], target[1], text)])
        theirs.append(states[1])
    return torch.cat(ours), torch.cat(theirs)


def places_of(old: XCLlamaProcessor, new: XCLlamaProcessor, text: str) -> list[int]:
    """For each context token of `new`, the token of `old` that ends with it or next after it.

    A token without text, as the one that starts a sequence, stands for the first one.
    """
    old_ends, new_ends = _ends(old, text), _ends(new, text)
    return [min(bisect_left(old_ends, end), len(old_ends) - 1) for end in new_ends]


def _ends(processor: XCLlamaProcessor, text: str) -> list[int]:
    """Where each token of a context ends in its text, never falling."""
    return list(accumulate((end for _, end in Prompts(processor).context_offsets(text)), max))


def projected(model: XCLlamaForCausalLM, states: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of every block, `[num_tokens, kv_heads * head_dim]`."""
    dtype = model.model.context_projections[0].k_proj.weight.dtype
    pairs = [projection(states.to(dtype)) for projection in model.model.context_projections]
    keys, values = zip(*[(key.flatten(1).float(), value.flatten(1).float()) for key, value in pairs], strict=True)
    return list(keys), list(values)


def _share(old: XCLlamaForCausalLM, new: XCLlamaForCausalLM, parts: list[Tensor], side: str) -> Tensor:
    """Shared keys (`side` "q_proj") or values ("o_proj") out of `parts` by block; sets the new blocks' `side`."""
    config = new.config
    size, groups = config.cross_attention_head_dim, config.cross_attention_num_key_value_heads
    width = size * config.cross_attention_num_heads // groups
    shared = []
    for group in range(groups):
        heads = slice(group * width, (group + 1) * width)
        own = torch.cat([part[:, group * size : (group + 1) * size] for part in parts], 1).double()
        centred = own - own.mean(0)
        reads = [_reads(block, side, heads, size) for block in old.model.cross_attention_blocks]
        root = _square_root(centred.T @ centred / len(own))
        # what every block's queries or outputs take from its own keys or values, whitened
        taken = root @ torch.block_diag(*(read.T @ read for read in reads)) @ root
        scale, vectors = torch.linalg.eigh(taken)
        basis = vectors[:, -size:]
        logger.info("shared head %d keeps %.3f of what %s takes", group, scale[-size:].sum() / scale.sum(), side)
        shared.append((own @ torch.linalg.solve(root, basis)).float())
        for block, read, part in zip(new.model.cross_attention_blocks, reads, (root @ basis).split(size), strict=True):
            _set_reads(block, side, heads, size, read @ part)
    return torch.cat(shared, 1)


def _reads(block: nn.Module, side: str, heads: slice, size: int) -> Tensor:
    """`[rows, head_dim]`: directions in which a block's heads of one group read keys or values."""
    if side == "q_proj":
        weight = block.q_proj.weight[heads] * block.input_norm.weight
        return weight.double().unflatten(0, (-1, size)).transpose(1, 2).flatten(0, 1)
    weight = block.o_proj.weight[:, heads] * (1.0 if block.gate is None else block.gate)
    return weight.double().unflatten(1, (-1, size)).transpose(0, 1).flatten(0, 1)


def _set_reads(block: nn.Module, side: str, heads: slice, size: int, weight: Tensor) -> None:
    """The inverse of `_reads`."""
    if side == "q_proj":
        weight = weight.unflatten(0, (-1, block.q_proj.weight.shape[1])).transpose(1, 2).flatten(0, 1)
        block.q_proj.weight[heads] = (weight / block.input_norm.weight).to(block.q_proj.weight.dtype)
    else:
        weight = weight.unflatten(0, (-1, block.o_proj.weight.shape[0])).transpose(0, 1).flatten(1)
        gate = 1.0 if block.gate is None else block.gate
        block.o_proj.weight[:, heads] = (weight / gate).to(block.o_proj.weight.dtype)


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix, kept away from singular."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=values[-1] * 1e-6).sqrt()) @ vectors.T
