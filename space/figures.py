"""HTML of what is shown beside the answers: figures, bars, where an answer stands. All input is escaped."""

from collections.abc import Sequence
from html import escape

from reader import Answer, Read
from visitors import Document

# letters of a passage that is not the answer's
SNIPPET = 160


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
    score = "" if answer.score is None else f"score <b>{answer.score:.2f}</b> · "
    return (
        f'<p class="figures">{score}first token <b>{answer.first_token_seconds:.2f} s</b>{speed} · '
        f"{answer.num_tokens} token{plural}</p>"
    )


def reading(answer: Answer) -> str:
    """While an answer from the cache is made: nothing is shown of it before its score is known."""
    return f'<p class="figures">reading … {answer.seconds:.1f} s</p>'


def headline(bytes_per_token: dict[str, float], cache_seconds: float, prompt_seconds: float | None) -> str:
    """What the cache saved for this question, in a line; None: it was not asked with the text in the prompt."""
    kv_cache, cache = bytes_per_token["KV cache of the decoder"], bytes_per_token["context cache"]
    parts = [f"<b>{kv_cache / cache:.0f} × smaller</b> than a KV cache"]
    if prompt_seconds is not None:
        ratio = prompt_seconds / max(cache_seconds, 1e-6)
        word = "sooner" if ratio >= 1 else "later"
        parts.append(f"first token <b>{max(ratio, 1 / ratio):.1f} × {word}</b> than with the text in the prompt")
    return f'<p class="headline">{" · ".join(parts)}</p>'


def costs(documents: Sequence[Document], bytes_per_token: dict[str, float]) -> str:
    """A table of the documents: tokens, time to encode, bytes of the cache beside those of a KV cache."""
    if not documents:
        return hint("No document is switched on.")
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


def times_chart(seconds: dict[str, float]) -> str:
    """Time to the first token of this question, by where the texts were read; nothing before both are known."""
    if len(seconds) < 2:
        return ""
    rows = [(name, value, f"{value:.2f} s") for name, value in seconds.items()]
    return "<h3>Time to the first token</h3>" + bars("Seconds, this question", rows)


def places(answer: Answer) -> str:
    """The passage of the answer with its sentence marked, and what else was read; of a declined one all that was."""
    if not answer.reads:
        return ""
    parts, others = [], answer.reads
    if answer.found:
        parts.append(_passage(answer))
        others = others[1:]
    items = "".join(map(_item, others))
    if items:
        title = "Also read" if answer.found else "What was read"
        parts.append(f'<h3>{title}</h3><ol class="evidence">{items}</ol>')
    return "".join(parts)


def _passage(answer: Answer) -> str:
    read, (start, end) = answer.reads[0], answer.sentence
    text, name = read.document.text, escape(read.document.name)
    inside = f"{escape(text[read.start : start])}<mark>{escape(text[start:end])}</mark>{escape(text[end : read.end])}"
    return (
        f'<h3>Where it stands</h3><p class="hint">{name}, characters {start + 1:,} to {end:,}</p>'
        f'<div class="text" tabindex="0" role="region" aria-label="Passage of {name}">{inside}</div>'
    )


def _item(read: Read) -> str:
    quoted, name = escape(_snippet(read.document.text[read.start : read.end])), escape(read.document.name)
    own = f"its answer: {escape(read.answer) or 'none'} ({read.score:.2f})"
    return f"<li><q>{quoted}</q> <small>{name}, {own}</small></li>"


def _snippet(text: str) -> str:
    """The beginning of a passage in one line, in whole words."""
    line = " ".join(text.split())
    return line if len(line) <= SNIPPET else line[:SNIPPET].rpartition(" ")[0] + " …"
