"""What one forward pass of training reads, as tensors."""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch, rows padded on the right.

    Args:
        keys: of the examples, for messages.
        input_ids, attention_mask: `[rows, length]`.
        answer_mask: bool `[rows, length]`, the tokens of the answer and its end.
        question_mask: bool `[rows, length]`, the tokens of the question itself.
        context_states: `[num_tokens, width]` states of the passages, back to back; None without stored states.
        context_ids: int `[num_tokens]`, the token ids of the passages.
        offsets: first token of each passage and the end of the last.
        rows: the passages that each row reads.
        own: the passage that each row's question is about.
        span_positions: int `[num_spans, 2]`, the row and the position that predict an answer token which the row's
            context holds; None unless asked for.
        span_mask: bool `[num_spans, longest context]`, where in the row's context that token stands.
    """

    keys: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    question_mask: Tensor
    context_states: Tensor | None
    context_ids: Tensor
    offsets: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    own: tuple[int, ...]
    span_positions: Tensor | None = None
    span_mask: Tensor | None = None

    @property
    def num_targets(self) -> int:
        """Answer tokens that are predicted."""
        return int(self.answer_mask[:, 1:].sum())

    def passages(self) -> list[Tensor]:
        """Token ids of each passage."""
        return list(self.context_ids.split([end - start for start, end in pairwise(self.offsets)]))

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        moved = {
            item.name: getattr(self, item.name).to(device)
            for item in dataclasses.fields(self)
            if isinstance(getattr(self, item.name), Tensor)
        }
        return dataclasses.replace(self, **moved)
