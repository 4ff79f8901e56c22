"""What happens on each of the visitor's actions; Gradio passes the request, whose session is the visitor's key."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import figures
import gradio as gr
from documents import MAX_NAME_LETTERS, DocumentError, clean, read_file
from reader import Reader
from visitors import Visitors, unique_name

FROM_CACHE, FROM_PROMPT = "context cache", "text in the prompt"
DECLINED = "Not found in these documents."
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
        # what the page does not let pass may come from elsewhere
        if len(name or "") > MAX_NAME_LETTERS:
            error = f"A name may have {MAX_NAME_LETTERS} letters. Shorten it."
            return figures.message(error, "error"), *self.show_documents(chosen, key_of(request))
        name = (name or "").strip() or "pasted text"
        return self._add([(name, lambda: clean(text or "", name))], chosen, key_of(request), progress)

    def add_example(
        self,
        name: str,
        text: str,
        chosen: list[str],
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008
    ) -> Update:
        """Switch an example on, encoded at the first time."""
        key = key_of(request)
        if name in self.visitors.get(key).documents:
            return "", *self.show_documents([*chosen, name], key)
        return self._add([(name, lambda: clean(text, name))], chosen, key, progress)

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

        def report(share: float, seconds: float | None) -> None:
            left = "" if seconds is None else f", about {max(seconds, 1):.0f} s left"
            progress(share, f"Encoding “{name}”{left}")

        document = self.reader.encode(name, text, report)
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
        """Answer from the caches of what is switched on.

        Yields:
            Answer, figures, headline, places, for screen readers, and seconds to the first token (None: no answer).
        """
        key = key_of(request)
        try:
            documents = self.visitors.documents(key, chosen)
            for answer in self.reader.answer_from_cache(question, documents):
                yield "", figures.reading(answer), "", "", "", None
        except DocumentError as error:
            yield "", figures.message(str(error), "error"), "", "", escape(str(error)), None
            return
        text = answer.text if answer.found else DECLINED
        headline = figures.headline(self.reader.bytes_per_token, answer.first_token_seconds, None)
        shown = figures.answer_figures(answer), headline, figures.places(answer)
        yield text, *shown, said(FROM_CACHE, text), answer.first_token_seconds

    def ask_prompt(
        self, question: str, chosen: list[str], compare: bool, seconds: float | None, request: gr.Request
    ) -> Iterator[Update]:
        """The same with the texts in the prompt: answer, figures, headline, times, for screen readers.

        Args:
            seconds: to the first token from the cache; None: that gave no answer, and said why.
        """
        if not compare or seconds is None:
            yield "", "", gr.skip(), "", gr.skip()
            return
        try:
            for answer in self.reader.answer_from_prompt(question, self.visitors.documents(key_of(request), chosen)):
                yield answer.text, figures.answer_figures(answer), gr.skip(), gr.skip(), gr.skip()
        except DocumentError as error:
            yield "", figures.message(str(error), "error"), gr.skip(), "", escape(str(error))
            return
        headline = figures.headline(self.reader.bytes_per_token, seconds, answer.first_token_seconds)
        times = figures.times_chart({FROM_CACHE: seconds, FROM_PROMPT: answer.first_token_seconds})
        yield answer.text, figures.answer_figures(answer), headline, times, said(FROM_PROMPT, answer.text)

    def leave(self, request: gr.Request) -> None:
        """Forget a visitor who closed the page."""
        if request.session_hash:
            self.visitors.forget(request.session_hash)


def said(label: str, text: str) -> str:
    """A complete answer as screen readers say it."""
    return f"Answer, {label}: {escape(text) or 'nothing'}"


def key_of(request: gr.Request) -> str:
    """The visitor's key: the random hash of the browser's session."""
    if not request.session_hash:
        raise gr.Error("This request has no session: use the page, or gradio_client.")
    return request.session_hash
