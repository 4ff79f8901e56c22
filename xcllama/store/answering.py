"""One question against a store: search, read each passage that was found by itself, keep the surest answer."""

from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import StoppingCriteria

from modeling_xcllama.answer_scores import NOT_FOUND
from modeling_xcllama.pipeline_xcllama import NUM_PASSAGES, ContextQuestionAnsweringPipeline

from .counters import Counters
from .search import Hit


@dataclass
class Answer:
    """An answer, the sentence and passage that it was read from, what else was read, and what it cost.

    Args:
        text: the answer, or that there is none in these documents.
        score: of the answer, from 0 to 1 (`modeling_xcllama.answer_scores.judge`).
        found: False: the answer was declined, or the search found nothing.
        sentence: that the answer stands in.
        start, end: its characters in the document's text.
        hit: the passage; None where nothing was found.
        hits: all that were read, in the order of the search.
        answers: of each of them: its own answer, score and whether it counts.
        cost: of search and states.
    """

    text: str
    score: float
    found: bool
    sentence: str
    start: int
    end: int
    hit: Hit | None
    hits: list[Hit]
    answers: list[dict]
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
    store, model, processor, question: str, *, k: int = NUM_PASSAGES, where: dict | None = None, **generate_kwargs
) -> Answer:
    """Answer from the passage, of the `k` that the search finds, whose answer scores best.

    Args:
        store: a `ContextStore` of this model.
        where: metadata of the documents to search.
        generate_kwargs: of the pipeline, `max_new_tokens=32` by default.
    """
    begin = perf_counter()
    with store.request() as cost:
        hits = store.search(question, k, where)
        cache = store.get(hits) if hits else None
    if cache is None:
        return Answer(NOT_FOUND, 0.0, False, "", 0, 0, None, [], [], cost, 0.0, perf_counter() - begin)
    answering = ContextQuestionAnsweringPipeline(model=model, processor=processor)
    first = FirstToken()
    options = {"max_new_tokens": 32, "stopping_criteria": [first], "num_passages": k} | generate_kwargs
    texts = [[hit.text for hit in hits]]
    (answer,) = answering(question, texts, cache.join([range(len(hits))]), **options)["answers"]
    own = {one["document"]: one for one in answer["passages"]}
    return Answer(
        text=answer["answer"],
        score=answer["score"],
        found=answer["found"],
        sentence=answer["sentence"],
        start=hits[answer["document"]].start + answer["start"],
        end=hits[answer["document"]].start + answer["end"],
        hit=hits[answer["document"]],
        hits=hits,
        answers=[{name: own[place][name] for name in ("answer", "score", "found")} for place in range(len(hits))],
        cost=cost,
        first_token_seconds=first.seconds,
        seconds=perf_counter() - begin,
    )
