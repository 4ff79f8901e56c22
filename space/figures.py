"""HTML of what is shown beside the answers: figures, bars, texts with what was attended to. All input is escaped."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from html import escape

from reader import Answer
from torch import Tensor
from visitors import Document, Timing

SHADES = 4
# left out where a passage is cut out of its sentence; letters that are added at most to a word that is cut
ENDS = " \n\t.,;:!?"
HALF_WORD = 24


def number_bytes(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024 or unit == "MiB":
            digits = 0 if unit == "bytes" or count >= 100 else 1
            return f"{count:,.{digits}f}\N{NO-BREAK SPACE}{unit}"
        count /= 1024
    raise AssertionError("the loop always returns")


def message(text: str, kind: str = "note") -> str:
    """A line for the visitor; `kind` is "note" or "error"."""
    mark = {"note": "✓", "error": "!"}[kind]
    return f'<p class="message {kind}"><span aria-hidden="true">{mark}</span> {escape(text)}</p>'


def hint(text: str) -> str:
    """A line in place of a figure that is not there yet."""
    return f'<p class="hint">{escape(text)}</p>'


def answer_figures(answer: Answer) -> str:
    """Time to the first token and speed."""
    speed = f" · {answer.tokens_per_second:.1f} tokens/s" if answer.num_tokens > 1 else ""
    plural = "" if answer.num_tokens == 1 else "s"
    return (
        f'<p class="figures">first token <b>{answer.first_token_seconds:.2f} s</b>{speed} · '
        f"{answer.num_tokens} token{plural}</p>"
    )


def costs(documents: Sequence[Document], bytes_per_token: dict[str, float]) -> str:
    """A table of the documents: tokens, time to encode, bytes of the cache beside those of a KV cache."""
    if not documents:
        return hint("No document is switched on: the model answers from what it knows.")
    kv_bytes = next(iter(bytes_per_token.values()))
    rows = []
    for document in documents:
        rows.append((document.name, document.cache.num_tokens, document.seconds, document.cache.nbytes))
    if len(rows) > 1:
        rows.append(("together", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{tokens:,}</td><td>{seconds:.1f}&nbsp;s</td>'
        f"<td>{number_bytes(size)}</td><td>{number_bytes(kv_bytes * tokens)}</td></tr>"
        for name, tokens, seconds, size in rows
    )
    heads = ("document", "tokens", "encoding", "cache", "KV cache")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        '<div class="scroll" tabindex="0"><table class="costs"><caption>What is switched on and its cost</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def bars(caption: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """A bar chart that is a table: labels, values as lengths, and the values as text."""
    longest = max((value for _, value, _ in rows), default=0.0) or 1.0
    body = "".join(
        f'<tr class="{"ours" if label.startswith("context cache") else "theirs"}"><th scope="row">{escape(label)}</th>'
        f'<td><span class="bar" style="width:{100 * value / longest:.1f}%"></span> {escape(text)}</td></tr>'
        for label, value, text in rows
    )
    return f'<table class="bars"><caption>{escape(caption)}</caption><tbody>{body}</tbody></table>'


def bytes_chart(bytes_per_token: dict[str, float]) -> str:
    """Bytes that a token of a document costs, by kind of cache."""
    rows = [(name, size, f"{size:,.0f}") for name, size in bytes_per_token.items()]
    return "<h3>Memory</h3>" + bars("Bytes a token of a document", rows)


def latency_chart(timings: Sequence[Timing]) -> str:
    """Time to the first token of the last questions, newest first."""
    parts = [] if timings else [hint("The times of your questions appear here.")]
    for timing in reversed(timings):
        rows = [(name, seconds, f"{seconds:.2f} s") for name, seconds in timing.first_token_seconds.items()]
        parts.append(bars(f"“{timing.question[:80]}” ({timing.num_tokens:,} tokens of documents)", rows))
    return "<h3>Time to the first token</h3>" + "".join(parts)


def word_shades(text: str, spans: Tensor, weights: Tensor) -> list[tuple[int, int, int]]:
    """(first, last, shade) of each word that got attention: shade 1 to `SHADES`, relative to the most attended one.

    Args:
        text: of a document.
        spans: characters of its tokens, `[num_tokens, 2]`.
        weights: of its tokens, relative to the most attended token of all documents, `[num_tokens]`.
    """
    words = [match.span() for match in re.finditer(r"\S+", text)]
    ends, totals = [last for _, last in words], [0.0] * len(words)
    for (first, last), weight in zip(spans.tolist(), weights.tolist(), strict=True):
        if word := text[first:last].rstrip():
            totals[bisect_left(ends, first + len(word))] += weight
    shades = [min(SHADES, round(SHADES * total)) for total in totals]
    return [(*span, shade) for span, shade in zip(words, shades, strict=True) if shade]


def highlighted(documents: Sequence[Document], weights: Tensor, evidence: Sequence) -> str:
    """The passages attended to most, then each document with its words shaded by attention."""
    items = "".join(
        f"<li><q>{escape(_quoted(documents[span.document].text, span.start, span.end))}</q> "
        f"<small>{span.weight:.0%} of the attention, {escape(documents[span.document].name)}</small></li>"
        for span in evidence
    )
    parts = [f'<h3>Passages attended to most</h3><ol class="evidence">{items}</ol>']
    scaled = (weights / weights.max().clamp(min=1e-9)).split([len(document.spans) for document in documents])
    for document, part in zip(documents, scaled, strict=True):
        name, inside = escape(document.name), _shaded(document.text, word_shades(document.text, document.spans, part))
        parts.append(
            f'<details open><summary>{name}</summary><div class="text" tabindex="0" role="region" '
            f'aria-label="Text of {name}, shaded by attention">{inside}</div></details>'
        )
    return "".join(parts)


def _quoted(text: str, start: int, end: int) -> str:
    """A passage in one line, with the words whole that it begins and ends with."""
    if not text[start].isspace():
        start -= len(re.search(r"\S*\Z", text[max(0, start - HALF_WORD) : start])[0])
    if not text[end - 1].isspace():
        end += len(re.match(r"\S*", text[end : end + HALF_WORD])[0])
    return " ".join(text[start:end].strip(ENDS).split())


def _shaded(text: str, shades: Sequence[tuple[int, int, int]]) -> str:
    pieces, position = [], 0
    for first, last, shade in shades:
        pieces.append(f'{escape(text[position:first])}<mark class="a{shade}">{escape(text[first:last])}</mark>')
        position = last
    return "".join(pieces) + escape(text[position:])
