"""One question against a store: search, read each passage that was found by itself, keep the surest answer."""

from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import StoppingCriteria

from modeling_xcllama.pipeline_xcllama import ContextQuestionAnsweringPipeline

from .counters import Counters
from .search import Hit


@dataclass
class Answer:
    """An answer and the passage that it was read from, what else was found, and what it cost.

    Args:
        score: the pipeline's, larger is surer.
        hit: the passage.
        hits: all that were read, in the order of the search.
        cost: of search and states.
    """

    text: str
    score: float
    hit: Hit
    hits: list[Hit]
    cost: Counters
    first_token_seconds: float
    seconds: float


class FirstToken(StoppingCriteria):
    """Notes when `generate` has its first new token; stops nothing."""

    def __init__(self):
        self._begin, self.seconds = perf_counter(), 0.0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        self.seconds = self.seconds or perf_counter() - self._begin
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def ask(
    store, model, processor, question: str, *, k: int = 4, where: dict | None = None, max_new_tokens: int = 32
) -> Answer:
    """Answer from the passage, of the `k` that the search finds, whose answer scores best.

    Args:
        store: a `ContextStore` of this model.
        where: metadata of the documents to search.

    Raises:
        ValueError: nothing in the store has a word of the question.
    """
    begin = perf_counter()
    with store.request() as cost:
        hits = store.search(question, k, where)
        if not hits:
            raise ValueError(f"no document of the store has a word of the question {question!r:.80}.")
        cache = store.get(hits)
    answering = ContextQuestionAnsweringPipeline(model=model, processor=processor)
    first = FirstToken()
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "stopping_criteria": [first]}
    answers = answering([question] * len(hits), context_cache=cache, **options)["answers"]
    best = max(range(len(hits)), key=lambda place: answers[place]["score"])
    answer = answers[best]
    return Answer(answer["answer"], answer["score"], hits[best], hits, cost, first.seconds, perf_counter() - begin)
