"""`xcllama ask`: a question to a store of documents, answered from the passage whose answer is the surest."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from xcllama.commands.opening import AsJson, K, Model, Namespace, Store, Where, load, open_store

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def ask(
    store: Store,
    question: str,
    model: Model = None,
    k: K = 4,
    where: Where = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each passage's answer.")] = 32,
    namespace: Namespace = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question, with the sentence that the answer stands in; say so where the documents hold none."""
    from xcllama.store.answering import ask as answer_from

    encoder, processor, _ = load(model, store, namespace)
    condition = json.loads(where) if where else None
    with open_store(store, namespace, encoder, processor) as opened:
        answer = answer_from(opened, encoder, processor, question, k=k, where=condition, max_new_tokens=max_new_tokens)
    if as_json:
        typer.echo(json.dumps(asdict(answer) | {"question": question}, ensure_ascii=False))
        return
    typer.echo("\n".join(_lines(answer)))


def _lines(answer) -> list[str]:
    """The answer and where it stands, or that there is none and what was read; what it cost."""
    lines = [f"{answer.text}  (score {answer.score:.2f})"]
    if answer.found:
        lines.append(f"from {_where(answer.hit)}: {' '.join(answer.sentence.split())}")
    elif not answer.hits:
        lines.append("no document has a word of the question")
    for hit, own in zip(answer.hits, answer.answers, strict=True):
        if not answer.found or hit != answer.hit:
            lines.append(f"read {_where(hit)}: {' '.join(hit.snippet.split())}")
            lines.append(f"     its answer: {own['answer']} (score {own['score']:.2f})")
    cost = answer.cost
    return [
        *lines,
        f"cost: {cost.hits} passages, {cost.bytes_read:,} bytes read, {cost.bytes_fetched:,} fetched; search "
        f"{1e3 * cost.search_seconds:.1f} ms, load {1e3 * cost.get_seconds:.1f} ms, first token "
        f"{1e3 * answer.first_token_seconds:.0f} ms, all {answer.seconds:.2f} s",
    ]


def _where(hit) -> str:
    return f"{hit.id}, page {hit.page}" if hit.page else hit.id


def shown(hit) -> str:
    """Where a passage stands, how well its words fit, and how it begins."""
    page = f", page {hit.page}" if hit.page else ""
    return f"{hit.id} (score {hit.score:.2f}{page}, {hit.tokens} tokens): {' '.join(hit.snippet.split())}"
