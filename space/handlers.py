"""What happens on each of the visitor's actions; Gradio passes the request, whose session is the visitor's key."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import figures
import gradio as gr
from documents import DocumentError, clean, read_file
from reader import Answer, Reader
from visitors import Timing, Visitors, unique_name

FROM_CACHE, FROM_PROMPT = "context cache", "text in the prompt"
Update = tuple  # new values of the components that page.py names for the event


class Handlers:
    """The actions of the page.

    Args:
        reader: the model.
        visitors: their documents.
    """

    def __init__(self, reader: Reader, visitors: Visitors):
        self.reader, self.visitors = reader, visitors

    def add_files(
        self,
        files: Sequence[str] | None,
        chosen: list[str],
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008
    ) -> Update:
        """Encode uploaded files, and delete them."""
        texts = [(Path(file).name, lambda file=file: read_file(file, Path(file).name)) for file in files or ()]
        try:
            return self._add(texts, chosen, key_of(request), progress)
        finally:
            for file in files or ():
                Path(file).unlink(missing_ok=True)

    def add_text(
        self,
        name: str,
        text: str,
        chosen: list[str],
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008
    ) -> Update:
        """Encode a text that was pasted."""
        name = name.strip() or "pasted text"
        return self._add([(name, lambda: clean(text, name))], chosen, key_of(request), progress)

    def _add(self, texts: Sequence[tuple], chosen: list[str], key: str, progress: gr.Progress) -> Update:
        messages, switched_on = [], list(chosen)
        for name, read in texts:
            try:
                document = self._encode(name, read(), key, progress)
            except DocumentError as error:
                messages.append(figures.message(str(error), "error"))
                continue
            switched_on.append(document.name)
            count = document.cache.num_tokens
            messages.append(
                figures.message(f"“{document.name}”: {count:,} tokens encoded in {document.seconds:.1f} s.", "note")
            )
        return "".join(messages), *self.show_documents(switched_on, key)

    def _encode(self, name: str, text: str, key: str, progress: gr.Progress):
        tokens = self.reader.count_tokens(text, name)
        self.visitors.check_room(key, round(tokens * self.reader.bytes_per_token["context cache"]))
        name = unique_name(name, self.visitors.get(key).documents)
        document = self.reader.encode(name, text, lambda share: progress(share, f"Encoding “{name}”"))
        self.visitors.add(key, document)
        return document

    def show_documents(self, switched_on: Sequence[str], key: str) -> Update:
        """The list of the visitor's documents with some of them switched on, and what those cost."""
        names = list(self.visitors.get(key).documents)
        switched_on = [name for name in switched_on if name in names]
        return (
            gr.CheckboxGroup(choices=names, value=switched_on, visible=bool(names)),
            gr.Button(visible=bool(names)),
            self._costs(switched_on, key),
        )

    def remove(self, chosen: list[str], request: gr.Request) -> Update:
        """Forget the documents that are switched on."""
        key = key_of(request)
        self.visitors.remove(key, chosen)
        gone = figures.message(f"{len(chosen)} document(s) removed.") if chosen else ""
        return gone or figures.message("Switch on what you want to remove.", "error"), *self.show_documents([], key)

    def toggle(self, chosen: list[str], request: gr.Request) -> str:
        """What the documents cost that are now switched on: nothing is encoded."""
        return self._costs(chosen, key_of(request))

    def _costs(self, names: Sequence[str], key: str) -> str:
        try:
            return figures.costs(self.visitors.documents(key, names), self.reader.bytes_per_token)
        except DocumentError as error:
            return figures.message(str(error), "error")

    def ask(self, question: str, chosen: list[str], request: gr.Request) -> Iterator[Update]:
        """Answer from the caches of what is switched on: answer, figures, passages, times, for screen readers."""
        key = key_of(request)
        try:
            documents = self.visitors.documents(key, chosen)
            for answer in self.reader.answer_from_cache(question, documents):
                yield answer.text, figures.answer_figures(answer), "", gr.skip(), ""
        except DocumentError as error:
            yield "", figures.message(str(error), "error"), "", gr.skip(), escape(str(error))
            return
        shown = figures.hint("Too much text to show what was attended to." if documents else "No document was read.")
        if answer.weights is not None:
            evidence = self.reader.evidence(answer.weights, documents)
            shown = figures.highlighted(documents, answer.weights, evidence)
        tokens = sum(document.cache.num_tokens for document in documents)
        self.visitors.get(key).timings.append(Timing(question, tokens))
        times = self._times(key, question, FROM_CACHE, answer)
        yield answer.text, figures.answer_figures(answer), shown, times, said(FROM_CACHE, answer)

    def ask_prompt(self, question: str, chosen: list[str], compare: bool, request: gr.Request) -> Iterator[Update]:
        """The same with the texts in the prompt: answer, figures, times, for screen readers."""
        key = key_of(request)
        if not compare:
            yield "", "", gr.skip(), gr.skip()
            return
        try:
            for answer in self.reader.answer_from_prompt(question, self.visitors.documents(key, chosen)):
                yield answer.text, figures.answer_figures(answer), gr.skip(), ""
        except DocumentError as error:
            yield "", figures.message(str(error), "error"), gr.skip(), escape(str(error))
            return
        times = self._times(key, question, FROM_PROMPT, answer)
        yield answer.text, figures.answer_figures(answer), times, said(FROM_PROMPT, answer)

    def _times(self, key: str, question: str, label: str, answer: Answer) -> str:
        timings = self.visitors.get(key).timings
        if timings and timings[-1].question == question:
            timings[-1].first_token_seconds[label] = answer.first_token_seconds
        return figures.latency_chart(timings)

    def leave(self, request: gr.Request) -> None:
        """Forget a visitor who closed the page."""
        if request.session_hash:
            self.visitors.forget(request.session_hash)


def said(label: str, answer: Answer) -> str:
    """A complete answer as screen readers say it."""
    return f"Answer, {label}: {escape(answer.text) or 'nothing'}"


def key_of(request: gr.Request) -> str:
    """The visitor's key: the random hash of the browser's session."""
    if not request.session_hash:
        raise gr.Error("This request has no session: use the page, or gradio_client.")
    return request.session_hash
