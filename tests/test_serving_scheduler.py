"""The scheduler: tokens equal those of `generate`, rows join and leave, contexts are read once and stay in bounds."""

import threading
import time

import pytest
import torch
from serving_support import TEXTS, generated, load_tiny

from xcllama.serving.answers import Answer, Sampling
from xcllama.serving.contexts import ResidentContexts, bytes_per_token
from xcllama.serving.scheduler import QueueFullError, Row, Scheduler

VARIANTS = {
    "block": {},
    "joint": {"cross_attention_mode": "joint", "context_layer": 2, "context_prefix": [3, 4]},
    "adapters": {"cross_attention_mode": "joint", "cross_attention_adapter_rank": 2},
    "condensed": {"cross_attention_share_key_value": True},
    "rope": {"cross_attention_rope": True},
}
# the documents that rows read: one, the same, two, others in another order, none
READS = [(0,), (0,), (1, 2), (2, 1), (), (3,), (4, 0)]


class Rows:
    """Rows over the documents of `TEXTS`, and what came out of each."""

    def __init__(self, model, processor, dtype=None):
        self.model, self.processor = model, processor
        self.cache = model.encode_context(**processor(contexts=list(TEXTS.values()), return_tensors="pt"))
        if dtype is not None:
            self.cache = self.cache.quantize(dtype)
        self.pieces: dict[Row, list] = {}

    def row(self, question: str, reads: tuple[int, ...], sampling: Sampling, seconds: float = 60, **options) -> Row:
        (prompt,) = self.processor(text=[question])["input_ids"]
        cache = self.cache.join([reads]) if reads else None
        answer = Answer(self.processor.tokenizer, [1], sampling)
        pieces = []
        row = Row(prompt, reads or None, cache, answer, pieces.append, time.monotonic() + seconds, **options)
        self.pieces[row] = pieces
        return row

    def text(self, row: Row) -> str:
        return "".join(piece.text for piece in self.pieces[row])

    def expected(self, question: str, reads: tuple[int, ...], num_tokens: int) -> list[int]:
        cache = self.cache.join([reads]) if reads else None
        return generated(self.model, self.processor, question, cache, num_tokens)


def scheduler_of(model, max_bytes: int = 1 << 20, **options) -> Scheduler:
    bounds = {"max_rows": 4, "max_length": 128, "max_waiting": 32} | options
    return Scheduler(model, contexts=ResidentContexts(max_bytes), **bounds)


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_tokens_equal_those_of_generate(fields, dtype):
    """Seven rows of different lengths over three slots: they join and leave at different steps."""
    rows = Rows(*load_tiny(**fields), dtype)
    scheduler = scheduler_of(rows.model, max_rows=3)
    taken = []
    for number, reads in enumerate(READS):
        row = rows.row(f"Which way does part {'x' * number} turn?", reads, Sampling(4 + 3 * (number % 3)))
        scheduler.submit([row])
        taken.append(row)
        scheduler.step()
    while scheduler.running or scheduler.waiting:
        scheduler.step()
    answers = [row.answer.tokens for row in taken]
    for number, (row, reads) in enumerate(zip(taken, READS, strict=True)):
        expected = rows.expected(f"Which way does part {'x' * number} turn?", reads, 4 + 3 * (number % 3))
        assert row.answer.tokens == expected
        assert rows.pieces[row][-1].finish_reason == "length"
        assert rows.text(row) == rows.processor.decode(expected, skip_special_tokens=True)
    # what is read shows in the answers
    assert answers[0] != answers[5]
    # far fewer calls than tokens: rows were decoded together
    assert scheduler.steps < sum(map(len, answers)) / 2
    assert not any(place.readers for place in scheduler.contexts._places.values())


def test_a_context_is_projected_once_and_read_once(tiny, monkeypatch):
    rows = Rows(*tiny)
    scheduler = scheduler_of(rows.model)
    projected, shapes = [], []
    project = type(rows.model).project_context
    monkeypatch.setattr(type(rows.model), "project_context", lambda *a: (projected.append(1), project(*a))[1])
    seen = ResidentContexts.rows
    monkeypatch.setattr(
        ResidentContexts,
        "rows",
        lambda self, names: (result := seen(self, names), shapes.append(result.rows.groups))[0],
    )
    scheduler.submit([rows.row(f"question {n}", (1, 2), Sampling(6)) for n in range(4)])
    while scheduler.running or scheduler.waiting:
        scheduler.step()
    assert len(projected) == 1
    # in a full step one span of keys serves all rows
    assert [len(members) for _, _, members in max(shapes, key=lambda groups: len(groups[0][2]))] == [4]


def test_least_recently_used_contexts_go_first(tiny):
    rows = Rows(*tiny)
    size = bytes_per_token(rows.model)
    lengths = rows.cache.lengths
    contexts = ResidentContexts(size * (lengths[0] + lengths[3] + 1))

    def add(name: int) -> bool:
        return contexts.add(name, lengths[name], lambda: rows.model.project_context(rows.cache.select([name])))

    assert add(0)
    assert add(3)
    contexts.take(0)
    contexts.release(0)
    # equal lengths: 6 takes the place of 3, which was read longer ago
    assert lengths[0] == lengths[3] == lengths[6]
    assert add(6)
    assert (0 in contexts, 3 in contexts, 6 in contexts) == (True, False, True)
    assert contexts.tokens * size <= contexts.max_bytes
    contexts.take(0)
    contexts.take(6)
    assert not add(3)
    assert contexts.evictions == 1
    contexts.release(6)
    assert add(3)
    with pytest.raises(ValueError, match="tokens; .* fit into"):
        contexts.add("huge", 10_000, None)


def test_rows_wait_for_contexts_to_leave(tiny):
    """Room for one context: rows of others take turns, and every answer is right."""
    rows = Rows(*tiny)
    longest = max(rows.cache.lengths)
    scheduler = scheduler_of(rows.model, bytes_per_token(rows.model) * longest)
    taken = [rows.row("Where?", (number,), Sampling(5)) for number in (0, 1, 0, 2)]
    scheduler.submit(taken)
    most = 0
    while scheduler.running or scheduler.waiting:
        scheduler.step()
        most = max(most, scheduler.contexts.tokens)
    assert most <= longest
    for row, number in zip(taken, (0, 1, 0, 2), strict=True):
        assert row.answer.tokens == rows.expected("Where?", (number,), 5)


def test_bounds_and_rows_that_nobody_waits_for(tiny):
    rows = Rows(*tiny)
    scheduler = scheduler_of(rows.model, max_rows=2, max_waiting=1)
    first, second, third = (rows.row("Where?", (0,), Sampling(40)) for _ in range(3))
    scheduler.submit([first, second, third])
    with pytest.raises(QueueFullError):
        scheduler.submit([rows.row("Where?", (0,), Sampling(40))])
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    first.cancelled = True
    scheduler.step()
    assert scheduler._running == [second, third]
    with pytest.raises(QueueFullError):
        scheduler.submit([rows.row("Where?", (0,), Sampling(40)) for _ in range(2)])
    second.deadline = 0
    scheduler.step()
    assert scheduler._running == [third]
    assert rows.pieces[second][-1].error == "timeout"
    late = rows.row("Where?", (0,), Sampling(40), seconds=-1)
    scheduler.submit([late])
    scheduler.step()
    assert rows.pieces[late][-1].error == "timeout"
    while scheduler.running:
        scheduler.step()
    assert third.answer.tokens == rows.expected("Where?", (0,), 40)


def test_closing_drains_and_a_dead_scheduler_leaves_nobody_waiting(tiny):
    rows = Rows(*tiny)
    scheduler = scheduler_of(rows.model)
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    row = rows.row("Where?", (0,), Sampling(10))
    scheduler.submit([row])
    scheduler.close()
    thread.join(60)
    assert row.answer.tokens == rows.expected("Where?", (0,), 10)
    with pytest.raises(QueueFullError):
        scheduler.submit([row])
    broken = scheduler_of(rows.model)
    lost = rows.row("Where?", None, Sampling(10))
    lost.prompt = [100_000]
    broken.submit([lost])
    with pytest.raises(IndexError):
        broken.run()
    assert rows.pieces[lost][-1].error == "stopped"
    assert not broken.alive


def test_sampling(tiny):
    rows = Rows(*tiny)
    scheduler = scheduler_of(rows.model, max_rows=6)

    def run(*samplings: Sampling) -> list[list[int]]:
        taken = [rows.row("Where?", (0,), sampling) for sampling in samplings]
        scheduler.submit(taken)
        while scheduler.running or scheduler.waiting:
            scheduler.step()
        return [row.answer.tokens for row in taken]

    greedy, drawn, again, other, narrow = run(
        Sampling(12),
        Sampling(12, temperature=1.5, seed=1),
        Sampling(12, temperature=1.5, seed=1),
        Sampling(12, temperature=1.5, seed=2),
        Sampling(12, temperature=1.5, top_p=1e-6, seed=3),
    )
    assert drawn == again != other
    assert narrow == greedy != drawn


def test_stop_strings_and_logprobs(tiny):
    model, processor = tiny
    logits = torch.full((258,), -20.0)
    ids = processor.tokenizer("The answer, at last: naïve ☃. Done")["input_ids"]

    def write(sampling: Sampling) -> tuple[str, list]:
        answer, pieces = Answer(processor.tokenizer, [1], sampling), []
        for token in [*ids, 1]:
            scores = logits.clone()
            scores[token], scores[5] = 2.0, 1.0
            pieces.append(answer.add(scores))
            if pieces[-1].finish_reason:
                break
        return "".join(piece.text for piece in pieces), pieces

    text, pieces = write(Sampling(100))
    assert text == "The answer, at last: naïve ☃. Done"
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].score == pytest.approx(float(torch.tensor(2.0).exp() / (torch.tensor([2.0, 1.0]).exp().sum())))
    # parts of characters are not shown
    assert "\ufffd" not in "".join(piece.text for piece in pieces)
    text, pieces = write(Sampling(100, stop=("lasting", " last:", "☃")))
    assert (text, pieces[-1].finish_reason) == ("The answer, at", "stop")
    text, pieces = write(Sampling(11, stop=("answer,",)))
    assert (text, pieces[-1].finish_reason) == ("The ", "stop")
    # the beginning of a stop string that does not come is part of the answer
    text, pieces = write(Sampling(10, stop=("answer,",)))
    assert (text, pieces[-1].finish_reason) == ("The answer", "length")
    (entry,) = write(Sampling(1, top_logprobs=2))[1][0].logprobs
    assert (entry["token"], entry["bytes"]) == ("T", [84])
    assert [other["token"] for other in entry["top_logprobs"]] == ["T", processor.tokenizer.decode([5])]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] > entry["top_logprobs"][1]["logprob"]


def test_a_sliding_window_has_to_hold_prompt_and_answer(tiny):
    model, _ = tiny
    model.config.sliding_window = 64
    try:
        with pytest.raises(ValueError, match="sliding window of 64, got 128"):
            scheduler_of(model)
    finally:
        model.config.sliding_window = None
