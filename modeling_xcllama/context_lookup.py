"""Context-lookup decoding: spans of the context are the draft, as prompt lookup does with the prompt.

The cache knows the token ids of its documents. Where the last tokens of an answer stand in the context, what follows
them there is proposed and verified in one pass; whatever the model would not have written is dropped.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

# a single token stands in too many places, and a wrong draft costs more than the step it replaces
SHORTEST_MATCH = 2
LONGEST_MATCH = 4


@dataclass
class ContextLookup:
    """What `generate(context_lookup_num_tokens=...)` drafts from, and how that went.

    Args:
        token_ids: of the context, `[length]`, on the CPU.
        passes: forward passes of the model.
        drafted: tokens that were proposed.
        accepted: tokens of them that the model would have written too.
    """

    token_ids: Tensor
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def __deepcopy__(self, memo) -> "ContextLookup":
        # assisted decoding copies its arguments: what is counted must reach the caller
        return self

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def find(self, recent: Tensor, longest: int, num_tokens: int) -> Tensor:
        """At most `num_tokens` ids that follow the last `longest` (or fewer) ids of `recent` in the context."""
        for size in range(min(longest, len(recent)), SHORTEST_MATCH - 1, -1):
            # one token at least must follow a match
            if len(self.token_ids) > size:
                windows = self.token_ids.unfold(0, size, 1)[:-1]
                matches = (windows == recent[-size:]).all(1).nonzero()
                if len(matches):
                    start = int(matches[0]) + size
                    return self.token_ids[start : start + num_tokens]
        return self.token_ids[:0]


class ContextLookupCandidateGenerator(PromptLookupCandidateGenerator):
    """Prompt lookup that looks into the context; options as in `PromptLookupCandidateGenerator`."""

    def __init__(self, lookup: ContextLookup, **options):
        super().__init__(**options)
        if self.max_matching_ngram_size < SHORTEST_MATCH:
            raise ValueError(
                f"`max_matching_ngram_size` must be at least {SHORTEST_MATCH}, got {self.max_matching_ngram_size}."
            )
        self.lookup = lookup

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, None]:
        """`input_ids` `[1, length]` and the draft after them."""
        self.lookup.passes += 1
        # the model adds one token of its own
        room = max(0, self.max_length - input_ids.shape[1] - 1)
        recent = input_ids[0, -self.max_matching_ngram_size :].cpu()
        draft = self.lookup.find(recent, self.max_matching_ngram_size, min(self.num_output_tokens, room))
        draft = draft.to(input_ids)
        if self.eos_token_id is not None:
            ends = torch.isin(draft, self.eos_token_id.to(draft.device)).nonzero()
            draft = draft[: int(ends[0])] if len(ends) else draft
        self.lookup.drafted += len(draft)
        return torch.cat([input_ids, draft[None]], dim=-1), None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: Tensor, num_matches: int) -> None:
        """Count what was accepted."""
        self.lookup.accepted += int(num_matches)
