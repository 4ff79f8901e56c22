"""Examples -> tensors: token ids, which tokens are targets, and the context that each row reads."""

import random
import re
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from xcllama.training.batch import Batch
from xcllama.training.examples import Example
from xcllama.training.prompts import Prompts


class Collator:
    """Makes batches of examples.

    Args:
        prompts: how questions and passages become token ids.
        passages: their texts.
        context_ids: token ids of each passage, as the encoder reads them.
        states: stored states, `states[index]` is `[length, width]`; None: the model encodes, or nothing is read.
        in_prompt: put the passages into the prompt (the LoRA baseline) instead of the context.
        context_dropout: share of a passage's tokens that no row may read; never the first, which draws idle attention.
        spans: say where the answers stand in the contexts.
    """

    def __init__(
        self,
        prompts: Prompts,
        passages: Sequence[str],
        context_ids: list[list[int]],
        states: Sequence[Tensor] | None = None,
        in_prompt: bool = False,
        context_dropout: float = 0.0,
        spans: bool = False,
    ):
        self.prompts, self.passages, self.context_ids, self.states = prompts, passages, context_ids, states
        self.in_prompt, self.context_dropout = in_prompt, context_dropout
        self.spans = spans

    def __call__(self, examples: list[Example]) -> Batch:
        """The batch of `examples`, in their order; each distinct passage is stored once."""
        encoded = [self._encode(example) for example in examples]
        ids, attention, answers, questions = self._pad(encoded)
        used = list(dict.fromkeys(passage for example in examples for passage in example.passages))
        kept = {passage: self._kept(passage, examples) for passage in used}
        place = {passage: position for position, passage in enumerate(used)}
        context_ids = [torch.tensor(self.context_ids[passage])[kept[passage]] for passage in used]
        states = None
        if self.states is not None:
            states = torch.cat([self.states[passage][kept[passage]] for passage in used])
        spans = {}
        if self.spans:
            spans = dict(zip(("span_positions", "span_mask"), self._spans(examples, encoded, kept), strict=True))
        return Batch(
            tuple(example.key for example in examples),
            ids,
            attention,
            answers,
            questions,
            states,
            torch.cat(context_ids),
            tuple(accumulate((len(item) for item in context_ids), initial=0)),
            tuple(tuple(place[passage] for passage in example.passages) for example in examples),
            tuple(place[example.own] for example in examples),
            **spans,
        )

    def _encode(self, example: Example) -> tuple[list[int], int, slice]:
        """(token ids, where the answer starts, where the question stands)."""
        passages = [self.passages[passage] for passage in example.passages] if self.in_prompt else None
        prompt, question = self.prompts.prompt_ids(example.question, example.history, passages)
        return prompt + self.prompts.answer_ids(example.answer), len(prompt), question

    def _pad(self, encoded: list[tuple[list[int], int, slice]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        length = max(len(ids) for ids, _, _ in encoded)
        ids = torch.full((len(encoded), length), self.prompts.pad_token_id)
        masks = torch.zeros(3, len(encoded), length, dtype=torch.bool)
        for row, (tokens, start, question) in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            masks[0, row, : len(tokens)] = True
            masks[1, row, start : len(tokens)] = True
            masks[2, row, question] = True
        return ids, masks[0].long(), masks[1], masks[2]

    def _spans(
        self, examples: list[Example], encoded: list[tuple[list[int], int, slice]], kept: dict[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`span_positions` and `span_mask` of a batch; an answer that no passage holds has no entry."""
        offsets = {passage: self.prompts.context_offsets(self.passages[passage]) for passage in kept}
        positions, masks = [], []
        for row, (example, (_, start, _)) in enumerate(zip(examples, encoded, strict=True)):
            answer_offsets = self.prompts.answer_offsets(example.answer)
            parts = []
            for passage in example.passages:
                places = answer_places(example.answer, answer_offsets, self.passages[passage], offsets[passage])
                mask = torch.zeros(len(places), len(offsets[passage]), dtype=torch.bool)
                for token, found in enumerate(places):
                    mask[token, found] = True
                parts.append(mask[:, kept[passage]])
            for token, mask in enumerate(torch.cat(parts, 1)):
                if mask.any():
                    # the token before the answer's predicts it
                    positions.append((row, start + token - 1))
                    masks.append(mask)
        longest = max(map(len, masks), default=0)
        padded = [torch.nn.functional.pad(mask, (0, longest - len(mask))) for mask in masks]
        return (
            torch.tensor(positions, dtype=torch.long).view(-1, 2),
            torch.stack(padded) if padded else torch.zeros(0, 0, dtype=torch.bool),
        )

    def _kept(self, passage: int, examples: list[Example]) -> Tensor:
        """Indices of the tokens of a passage that may be read: the same for all rows and processes of a step."""
        length = len(self.context_ids[passage])
        if not self.context_dropout:
            return torch.arange(length)
        key = next(example.key for example in examples if passage in example.passages)
        bucket = key.rsplit(":", 2)[0]
        generator = torch.Generator().manual_seed(random.Random(f"{bucket}:{passage}").getrandbits(62))
        hidden = torch.rand(length, generator=generator) < self.context_dropout
        hidden[0] = False
        return (~hidden).nonzero().squeeze(-1)


Offsets = list[tuple[int, int]]


def answer_places(answer: str, answer_offsets: Offsets, passage: str, offsets: Offsets) -> list[list[int]]:
    """For each token of an answer, the tokens of a passage that hold its characters, wherever the answer stands.

    Args:
        answer_offsets, offsets: first character of each token of the answer and of the passage, and the one after
            its last.

    Returns:
        A list for each token of the answer, empty where the passage does not hold the answer as whole words.
    """
    found = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", passage, re.IGNORECASE)]
    return [
        [
            index
            for index, (first, last) in enumerate(offsets)
            if any(first < place + end and place + start < last for place in found)
        ]
        for start, end in answer_offsets
    ]
