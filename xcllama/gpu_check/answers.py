"""F1 of a trained reader on the held-out questions of a pool."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modeling_xcllama import XCLlamaForCausalLM
from modeling_xcllama.context_encoding import pad_right
from xcllama.evaluation.metrics import exact_match, f1
from xcllama.training.token_pool import TokenPool


@torch.no_grad()
def held_out_answers(
    model: XCLlamaForCausalLM,
    pool: TokenPool,
    decode: Callable[[Tensor], str],
    deadline: float,
    count: int,
    max_new_tokens: int,
    batch_size: int = 60,
) -> dict[str, Any]:
    """Greedy answers to the first `count` held-out questions, each read from its cached passage.

    Args:
        decode: token ids of an answer -> text.
        deadline: on `time.monotonic`'s clock; no batch starts after it, and the figures say how many were answered.

    Returns:
        `questions`, `of`, `f1`, `exact_match` (None where no question was answered) and the answers.
    """
    model.eval()
    wanted = min(count, len(pool.held_answers))
    answers: list[str] = []
    for start in range(0, wanted, batch_size):
        if time.monotonic() > deadline:
            break
        answers += map(decode, _generate(model, pool, range(start, min(wanted, start + batch_size)), max_new_tokens))
    rows = list(zip(answers, pool.held_answers, strict=False))
    figures: dict[str, Any] = {"questions": len(rows), "of": wanted}
    for name, metric in (("f1", f1), ("exact_match", exact_match)):
        figures[name] = sum(metric(answer, accepted) for answer, accepted in rows) / len(rows) if rows else None
    return figures | {"answers": [{"answer": answer, "accepted": accepted} for answer, accepted in rows]}


def _generate(model: XCLlamaForCausalLM, pool: TokenPool, questions: range, max_new_tokens: int) -> list[Tensor]:
    """The new tokens of each of `questions`."""
    ids, mask = pad_right([pool.held_passages[index].to(model.device) for index in questions])
    prompts = [pool.held_prompts[index] for index in questions]
    longest = max(map(len, prompts))
    inputs = torch.full((len(prompts), longest), pool.pad_token_id)
    attention = torch.zeros_like(inputs)
    for row, prompt in enumerate(prompts):
        inputs[row, longest - len(prompt) :] = prompt
        attention[row, longest - len(prompt) :] = 1
    output = model.generate(
        inputs.to(model.device),
        attention_mask=attention.to(model.device),
        context_cache=model.encode_context(ids, mask),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pool.pad_token_id,
    )
    return list(output[:, longest:].cpu())
