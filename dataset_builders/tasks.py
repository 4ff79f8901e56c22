"""Training tasks: pure functions from a row to examples, as in the paper and beyond.

An example is a dict:

    task             name of the task, a key of `TASKS`
    dataset, sample_idx   the row it comes from
    titles, contexts what is encoded, `titles` as long as `contexts`
    useful_contexts  indices into `contexts`
    history          earlier turns [{question, answer}]
    question         what the decoder is asked
    answer           what it must say; `NO_ANSWER` where the contexts do not tell
    answers          all accepted answers

A task that a row has nothing for (a question task on plain text, a cloze without sentences) gives no example.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dataset_builders import text_tasks
from dataset_builders.distractors import DistractorPool, chunks
from dataset_builders.schema import NO_ANSWER, Row
from dataset_builders.splits import holds, normalize

Example = dict[str, Any]
Task = Callable[[Row, random.Random, DistractorPool], list[Example]]


def example(task: str, row: Row, **changes: Any) -> Example:
    """The example that asks the row's own question, with `changes`."""
    return {
        "task": task,
        "dataset": row["dataset"],
        "sample_idx": row["sample_idx"],
        "titles": row["titles_list"],
        "contexts": row["contexts_list"],
        "useful_contexts": row["useful_contexts"],
        "history": row["history"],
        "question": row["question"],
        "answer": row["answer"],
        "answers": row["answers"],
    } | changes


def question_answering(row: Row, generator: random.Random, pool: DistractorPool) -> list[Example]:
    """The row's question on its whole contexts."""
    return [example("question_answering", row)] if row["question"] else []


def question_in_context(row: Row, generator: random.Random, pool: DistractorPool) -> list[Example]:
    """The question put before each context that is encoded, and asked as usual."""
    if not row["question"]:
        return []
    contexts = [f"{row['question']}\n{text}" for text in row["contexts_list"]]
    return [example("question_in_context", row, contexts=contexts)]


def chunked_contexts(
    row: Row, generator: random.Random, pool: DistractorPool, max_words: int = 100, num_distractors: int = 2
) -> list[Example]:
    """The contexts in chunks of at most `max_words` words, among chunks of other documents, shuffled.

    Useful are the chunks of a useful context that hold an accepted answer, or all of them where none does.
    """
    if not row["question"]:
        return []
    pieces = [
        (title, piece, index in row["useful_contexts"])
        for index, (title, text) in enumerate(zip(row["titles_list"], row["contexts_list"], strict=True))
        for piece in chunks(text, max_words)
    ]
    answers = [normalize(answer) for answer in row["answers"]]
    exact = [useful and any(holds(piece, answer) for answer in answers) for _, piece, useful in pieces]
    flags = exact if any(exact) else [useful for _, _, useful in pieces]
    entries = [(title, piece, flag) for (title, piece, _), flag in zip(pieces, flags, strict=True)]
    for title, text in pool.draw(row, num_distractors, generator):
        entries.append((title, generator.choice(chunks(text, max_words)), False))
    generator.shuffle(entries)
    return [
        example(
            "chunked_contexts",
            row,
            titles=[title for title, _, _ in entries],
            contexts=[piece for _, piece, _ in entries],
            useful_contexts=[index for index, (_, _, useful) in enumerate(entries) if useful],
        )
    ]


def no_answer(row: Row, generator: random.Random, pool: DistractorPool) -> list[Example]:
    """The question on contexts of other documents, which do not hold its answer: `NO_ANSWER`."""
    if not row["answerable"]:
        return []
    others = pool.draw(row, len(row["contexts_list"]), generator)
    if not others:
        return []
    titles, contexts = [title for title, _ in others], [text for _, text in others]
    changes = {"titles": titles, "contexts": contexts, "useful_contexts": [], "history": []}
    return [example("no_answer", row, **changes, answer=NO_ANSWER, answers=[NO_ANSWER])]


def _on_text(name: str, task: Callable[..., list[tuple[str, str]]], whole: bool = False) -> Task:
    """A task on rows from a task on text: on all useful contexts together (`whole`), or on one of them."""

    def on_row(row: Row, generator: random.Random, pool: DistractorPool, **options: Any) -> list[Example]:
        useful = row["useful_contexts"] or list(range(len(row["contexts_list"])))
        chosen = useful if whole else [generator.choice(useful)]
        text = "\n".join(row["contexts_list"][index] for index in chosen)
        kept = chosen if whole else list(range(len(row["contexts_list"])))
        changes = {
            "titles": [row["titles_list"][index] for index in kept],
            "contexts": [row["contexts_list"][index] for index in kept],
            "useful_contexts": [kept.index(index) for index in chosen],
            "history": [],
        }
        pairs = task(text, generator, **options)
        return [example(name, row, **changes, question=q, answer=a, answers=[a]) for q, a in pairs]

    on_row.__doc__ = task.__doc__
    return on_row


context_repetition = _on_text("context_repetition", text_tasks.repeat, whole=True)
fill_in_the_middle = _on_text("fill_in_the_middle", text_tasks.fill_in_the_middle)
cloze = _on_text("cloze", text_tasks.cloze)
sentence_completion = _on_text("sentence_completion", text_tasks.complete_sentence)

TASKS: dict[str, Task] = {
    "question_answering": question_answering,
    "question_in_context": question_in_context,
    "chunked_contexts": chunked_contexts,
    "no_answer": no_answer,
    "context_repetition": context_repetition,
    "fill_in_the_middle": fill_in_the_middle,
    "cloze": cloze,
    "sentence_completion": sentence_completion,
}


def make_examples(
    rows: Iterable[Row],
    weights: dict[str, float],
    seed: int = 0,
    options: dict[str, dict[str, Any]] | None = None,
    pool_size: int = 256,
) -> Iterator[Example]:
    """Stream examples of `rows`: for each row, one task drawn with probability proportional to `weights`.

    A task without an example for a row is replaced by the others, in random order. What a row gives depends on the
    seed, the row and, for distractors, its neighbours in the stream; never on time or workers.

    Args:
        weights: task name -> weight, e.g. {"question_answering": 0.5, "context_repetition": 0.25, "cloze": 0.25}.
        options: task name -> its keyword arguments, e.g. {"chunked_contexts": {"max_words": 200}}.

    Raises:
        ValueError: an unknown task, or weights that are negative or all zero.
    """
    options = options or {}
    if unknown := sorted((set(weights) | set(options)) - set(TASKS)):
        raise ValueError(f"`weights` and `options` must name tasks of {', '.join(TASKS)}, got {', '.join(unknown)}.")
    if any(weight < 0 for weight in weights.values()) or sum(weights.values()) <= 0:
        raise ValueError(f"`weights` must be at least 0, and one of them more, got {weights}.")
    return _examples(iter(rows), weights, seed, options, DistractorPool(pool_size))


def _examples(
    rows: Iterator[Row], weights: dict[str, float], seed: int, options: dict[str, dict[str, Any]], pool: DistractorPool
) -> Iterator[Example]:
    # read ahead, so that the first rows have distractors too
    waiting: list[Row] = []
    for row in rows:
        pool.add(row)
        waiting.append(row)
        if len(waiting) == pool.size:
            yield from _flush(waiting, weights, seed, options, pool)
            waiting = []
    yield from _flush(waiting, weights, seed, options, pool)


def _flush(
    rows: list[Row], weights: dict[str, float], seed: int, options: dict[str, dict[str, Any]], pool: DistractorPool
) -> Iterator[Example]:
    for row in rows:
        generator = random.Random(f"{seed}:{row['dataset']}:{row['sample_idx']}")
        remaining = {name: weight for name, weight in weights.items() if weight > 0}
        while remaining:
            name = generator.choices(list(remaining), weights=list(remaining.values()))[0]
            del remaining[name]
            if made := TASKS[name](row, generator, pool, **options.get(name, {})):
                yield from made
                break
