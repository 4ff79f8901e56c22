"""The page: what stands where, and which action belongs to what."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import figures
import gradio as gr
from documents import MAX_NAME_LETTERS, MAX_TEXT_LETTERS
from handlers import Handlers
from reader import MAX_QUESTION_LETTERS

HERE = Path(__file__).resolve().parent
TITLE = "XC-Llama: ask your documents"
INTRODUCTION = """# Ask your documents

Each document is read **once** into a small *context cache*; answers come from it, with the sentence they stand in.
Try an example, or add your own documents.
"""
NOTES = """Documents stay in the memory of this Space, for you alone, until you close the page or {minutes} minutes
pass. The model is small: check what it says.
"""
# button, file in examples/, a question about it
EXAMPLES = (
    ("The clock museum", "clock_museum.txt", "Who founded the museum?"),
    ("Mountain bread", "mountain_bread.txt", "How much does a loaf weigh?"),
)
# system fonts only: nothing is fetched from elsewhere
FONTS = {
    "font": ["system-ui", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"],
    "font_mono": ["ui-monospace", "DejaVu Sans Mono", "monospace"],
}
# at least 4.5 to 1
CONTRAST = {
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "block_label_text_color": "*neutral_700",
    "block_title_text_color": "*neutral_700",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_600",
}
# what changes by itself is read out
SCRIPT = """() => {
  document.documentElement.lang = "en";
  for (const id of ["status", "said"])
    document.getElementById(id)?.setAttribute("aria-live", "polite");
  // answers can be reached by keyboard
  for (const answer of document.querySelectorAll("#cache-answer textarea, #prompt-answer textarea"))
    Object.assign(answer, {disabled: false, readOnly: true});
}"""


# two documents may be encoded side by side: a long one does not hold up a short one
ENCODING = {"concurrency_id": "encode", "concurrency_limit": 2}
# what it returns are the inputs of the function that follows
SCROLL = """() => {
  document.getElementById("cache-answer")?.scrollIntoView({behavior: "smooth", block: "nearest"});
  return [];
}"""


class Documents(NamedTuple):
    """The switches of the documents, and what is shown when some are added (the status first)."""

    chosen: gr.CheckboxGroup
    shown: list


class Answers(NamedTuple):
    """The switch of the comparison, and what both answers are shown in; the last for the cache are its seconds."""

    compare: gr.Checkbox
    cache: list
    prompt: list


def build(handlers: Handlers) -> gr.Blocks:
    """The page as Gradio blocks, with a queue."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row(equal_height=False):
            # on a phone the columns follow each other: asking comes first
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    buttons = [gr.Button(f"Example: {label}", min_width=140) for label, *_ in EXAMPLES]
                question = gr.Textbox(
                    label="Question",
                    placeholder="Ask about the documents that are switched on",
                    max_length=MAX_QUESTION_LETTERS,
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", scale=3, min_width=120)
                    stop = gr.Button("Stop", scale=1, min_width=80)
                answers = _answers(handlers)
            with gr.Column(scale=2, min_width=320):
                gr.Markdown("## Documents")
                documents = _documents(handlers)
        gr.Markdown(NOTES.format(minutes=round(handlers.visitors.idle_seconds / 60)))
        # what was said of documents goes, too, unless it was said just now
        own = {"status": documents.shown[:1]}
        running = _asked(ask.click, handlers, question, documents, answers, **own, public=True)
        running += _asked(question.submit, handlers, question, documents, answers, **own)
        for button, (label, file, asked) in zip(buttons, EXAMPLES, strict=True):
            example = [gr.State(label), gr.State((HERE / "examples" / file).read_text(encoding="utf-8"))]
            shown = {"inputs": [*example, documents.chosen], "outputs": documents.shown, "api_visibility": "private"}
            button.click(lambda asked=asked: asked, outputs=question, api_visibility="private", queue=False)
            added = button.click(handlers.add_example, **shown, **ENCODING, show_progress_on=documents.shown[0])
            running += _asked(added.then, handlers, question, documents, answers)
        stop.click(None, cancels=running)
        page.unload(handlers.leave)
    # waiting visitors see their place in the queue
    return page.queue(max_size=64, default_concurrency_limit=1)


def launch_options(**options) -> dict:
    """What `launch` gets: looks, limits, and nothing that talks to others."""
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", **FONTS).set(**CONTRAST)
    return {
        "theme": theme,
        "css_paths": HERE / "style.css",
        "js": SCRIPT,
        "share": False,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "footer_links": ["api"],
        "max_file_size": "10mb",
        "state_session_capacity": 500,
        **options,
    }


def _documents(handlers: Handlers) -> Documents:
    """The right side: adding documents, switching them on and off, what they cost."""
    files = gr.File(label="txt, md, html, docx, epub or pdf, up to 5 MB", file_count="multiple", height=170)
    with gr.Accordion("Paste a text", open=False):
        name = gr.Textbox(label="Name", placeholder="pasted text", max_length=MAX_NAME_LETTERS)
        text = gr.Textbox(label="Text", lines=6, max_lines=12, max_length=MAX_TEXT_LETTERS)
        add = gr.Button("Add this text")
    status = gr.HTML(elem_id="status")
    chosen = gr.CheckboxGroup(
        label="Switched on for the next question",
        info="In any order, without encoding again",
        elem_id="documents",
        visible=False,
    )
    remove = gr.Button("Remove what is switched on", size="sm", visible=False)
    costs = gr.HTML(figures.costs([], handlers.reader.bytes_per_token), elem_id="costs")

    shown = [status, chosen, remove, costs]
    encoding = {"outputs": shown, "show_progress_on": status, **ENCODING}
    uploaded = files.upload(handlers.add_files, [files, chosen], api_name="add_files", **encoding)
    uploaded.then(lambda: None, outputs=files, api_visibility="private", queue=False)
    add.click(handlers.add_text, [name, text, chosen], api_name="add_text", **encoding)
    remove.click(handlers.remove, chosen, shown, api_name="remove", queue=False)
    chosen.input(handlers.toggle, chosen, costs, api_name="toggle", queue=False, show_progress="hidden")
    return Documents(chosen, shown)


def _answers(handlers: Handlers) -> Answers:
    """What an answer is shown in, and the figures of this question."""
    from_cache = gr.Textbox(label="Answer from the context cache", lines=2, elem_id="cache-answer")
    cache_figures = gr.HTML(elem_id="cache-figures")
    headline = gr.HTML(elem_id="headline")
    places = gr.HTML(elem_id="places")
    compare = gr.Checkbox(True, label="Compare with the text in the prompt (slower)", container=False)
    from_prompt = gr.Textbox(label="Answer with the text in the prompt", lines=2, elem_id="prompt-answer")
    prompt_figures = gr.HTML(elem_id="prompt-figures")
    times = gr.HTML(elem_id="times")
    with gr.Accordion("Memory", open=False):
        gr.HTML(figures.bytes_chart(handlers.reader.bytes_per_token), elem_id="bytes")
    said = gr.HTML(elem_id="said")
    cache = [from_cache, cache_figures, headline, places, said, gr.State(None)]
    return Answers(compare, cache, [from_prompt, prompt_figures, headline, times, said])


def _asked(
    trigger: Callable,
    handlers: Handlers,
    question: gr.Textbox,
    documents: Documents,
    answers: Answers,
    status: Sequence = (),
    public: bool = False,
) -> list:
    """What follows a trigger: nothing old stays, the answer is scrolled to, the cache answers, then the prompt."""
    shown = [*answers.cache[:-1], *answers.prompt[:2], answers.prompt[3], *status]
    hidden = {"api_visibility": "private"}
    names = ({"api_name": "ask"}, {"api_name": "ask_prompt"}) if public else (hidden, hidden)
    quietly = {"queue": False, "show_progress": "hidden"}
    cleared = trigger(lambda: [""] * len(shown), outputs=shown, js=SCROLL, **quietly, **hidden)
    first = cleared.then(
        handlers.ask,
        [question, documents.chosen],
        answers.cache,
        show_progress_on=answers.cache[0],
        concurrency_id="ask",
        **names[0],
    )
    second = first.then(
        handlers.ask_prompt,
        [question, documents.chosen, answers.compare, answers.cache[-1]],
        answers.prompt,
        show_progress_on=answers.prompt[0],
        concurrency_id="ask_prompt",
        **names[1],
    )
    return [first, second]
