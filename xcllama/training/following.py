"""A separate encoder learns to make the keys and values of a trained model, before any question is asked.

Every token of every passage is a target, so that a few hundred steps without the decoder teach what answers alone
would need many thousands for. The error is relative to the variance of each block's keys and values; a vector that all
keys of a step share is free, since it changes no attention.
"""

import logging
import random
from pathlib import Path

import torch
from torch import Tensor

from modeling_xcllama import XCLlamaForCausalLM, XCLlamaProcessor
from xcllama.training.build import in_frozen_precision
from xcllama.training.stored_states import store_states
from xcllama.training.transfer import places_of, projected

logger = logging.getLogger(__name__)

PASSAGES_PER_STEP = 8
LEARNING_RATE = 1e-3


def follow(
    source: tuple[XCLlamaForCausalLM, XCLlamaProcessor],
    target: tuple[XCLlamaForCausalLM, XCLlamaProcessor],
    passages: list[str],
    steps: int,
    folder: Path,
    seed: int = 0,
) -> float:
    """Train the target's encoder and projections on the source's keys and values of `passages`.

    Args:
        steps: of eight passages; the learning rate falls to 0.
        folder: where the source's states are kept.

    Returns:
        Mean relative error of the last tenth of the steps (1: no better than the mean).
    """
    (old, _), (new, processor) = source, target
    ids = [source[1](contexts=[text])["context_input_ids"][0] for text in passages]
    states = store_states(old, ids, folder)
    prefixes = ("model.encoder.", "model.context_projections.")
    weights = [w for name, w in new.named_parameters() if name.startswith(prefixes) and w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    generator, errors = random.Random(f"{seed}:follow"), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        chosen = generator.sample(range(len(passages)), min(PASSAGES_PER_STEP, len(passages)))
        rows = [states[index][places_of(source[1], processor, passages[index])] for index in chosen]
        with torch.no_grad():
            keys, values = projected(old, torch.cat(rows).to(new.device))
        with in_frozen_precision(new):
            contexts = [processor(contexts=[passages[index]])["context_input_ids"][0] for index in chosen]
            found = new.model.encode_packed([torch.tensor(context, device=new.device) for context in contexts])
            pairs = [projection(found) for projection in new.model.context_projections]
        error = torch.stack(
            [
                (_relative(_centred(key.flatten(1)), _centred(wanted)) + _relative(value.flatten(1), other)) / 2
                for (key, value), wanted, other in zip(pairs, keys, values, strict=True)
            ]
        ).mean()
        error.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
        if (step + 1) % 50 == 0:
            logger.info("step %d of %d: relative error %.3f", step + 1, steps, sum(errors[-50:]) / 50)
    last = errors[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _centred(part: Tensor) -> Tensor:
    return part - part.mean(0)


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    return (found.float() - wanted).square().sum() / _centred(wanted).square().sum()
