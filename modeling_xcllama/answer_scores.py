"""How sure an answer is: the probabilities that its tokens were written with, and when it is better declined."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateOutput

# what stands in place of an answer whose score is below `answer_threshold`
NOT_FOUND = "not found in these documents"


def answer_lengths(answers: Tensor, end_tokens: int | Sequence[int] | None) -> list[int]:
    """Tokens of each answer `[batch, length]` up to its first end token, that one included."""
    ends = [end_tokens] if isinstance(end_tokens, int) else list(end_tokens or [])
    is_end = torch.isin(answers, torch.tensor(ends, dtype=answers.dtype, device=answers.device)).long()
    return (is_end.cumsum(1) - is_end == 0).sum(1).tolist()


def token_scores(
    model: PreTrainedModel, outputs: GenerateOutput, end_tokens: int | Sequence[int] | None = None
) -> list[Tensor]:
    """Log-probabilities of each answer's own tokens, float32 on the CPU.

    Args:
        model: what generated them.
        outputs: of `generate(..., return_dict_in_generate=True, output_scores=True)`.
        end_tokens: ids that ended an answer; None: those of the model's generation config.
    """
    scores = model.compute_transition_scores(
        outputs.sequences, outputs.scores, getattr(outputs, "beam_indices", None), normalize_logits=True
    )
    ends = model.generation_config.eos_token_id if end_tokens is None else end_tokens
    lengths = answer_lengths(outputs.sequences[:, -scores.shape[1] :], ends)
    return [row[:length].float().cpu() for row, length in zip(scores, lengths, strict=True)]


def answer_score(scores: Tensor) -> float:
    """The score of an answer, in [0, 1]: the geometric mean of the probabilities of its tokens, its end included."""
    return float(scores.mean().exp())


def is_found(score: float, threshold: float | None) -> bool:
    """Whether an answer of that score is given; without an `answer_threshold` every answer is."""
    return threshold is None or score >= threshold


def judge(
    model: PreTrainedModel,
    decode: Callable[[Tensor], str],
    outputs: GenerateOutput,
    prompt_length: int,
    end_tokens: int | Sequence[int] | None = None,
) -> list[dict]:
    """What is made of each generated answer, for everything that answers users.

    Args:
        decode: ids to text.
        model, outputs, end_tokens: as in `token_scores`.
        prompt_length: tokens before the answers.

    Returns:
        "answer", "score", and "found": False where the score is below the config's `answer_threshold`.
    """
    written = outputs.sequences[:, prompt_length:]
    judged = []
    for ids, scores in zip(written, token_scores(model, outputs, end_tokens), strict=True):
        score = answer_score(scores)
        found = is_found(score, model.config.answer_threshold)
        judged.append({"answer": decode(ids[: len(scores)]).strip(), "score": score, "found": found})
    return judged


def surest(judged: Sequence[dict]) -> int:
    """Which of several judged answers to one question is given."""
    return max(range(len(judged)), key=lambda place: (judged[place]["found"], judged[place]["score"]))
