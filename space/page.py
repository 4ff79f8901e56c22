"""The page: what stands where, and which action belongs to what."""

from pathlib import Path

import figures
import gradio as gr
from handlers import Handlers

HERE = Path(__file__).resolve().parent
TITLE = "XC-Llama: ask your documents"
INTRODUCTION = """# Ask your documents

Each document is read **once** into a small *context cache*. Answers come from the cache: the text is in no prompt, and
no KV cache holds it. Beside it, the same model answers with the whole text in its prompt.
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


def build(handlers: Handlers) -> gr.Blocks:
    """The page as Gradio blocks, with a queue."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(INTRODUCTION)
        question = gr.Textbox(
            label="Question", placeholder="Ask about the documents that are switched on", max_length=2000, render=False
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                gr.Markdown("## Documents")
                chosen = _documents(handlers, question)
            with gr.Column(scale=3, min_width=320):
                gr.Markdown("## Question")
                question.render()
                _answers(handlers, question, chosen)
        gr.Markdown(NOTES.format(minutes=round(handlers.visitors.idle_seconds / 60)))
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


def _documents(handlers: Handlers, question: gr.Textbox) -> gr.CheckboxGroup:
    """The left side: adding documents, switching them on and off, what they cost."""
    files = gr.File(label="Upload .txt, .md or .pdf files (up to 5 MB)", file_count="multiple", height=160)
    with gr.Accordion("Paste a text", open=False):
        name = gr.Textbox(label="Name", placeholder="pasted text", max_length=60)
        text = gr.Textbox(label="Text", lines=6, max_lines=12)
        add = gr.Button("Add this text")
    with gr.Row():
        buttons = [gr.Button(f"Example: {label}", size="sm", min_width=120) for label, *_ in EXAMPLES]
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
    # two documents may be encoded side by side: a long one does not hold up a short one
    encoding = {
        "outputs": shown,
        "show_progress_on": status,
        "concurrency_id": "encode",
        "concurrency_limit": 2,
    }
    uploaded = files.upload(handlers.add_files, [files, chosen], api_name="add_files", **encoding)
    uploaded.then(lambda: None, outputs=files, api_visibility="private", queue=False)
    add.click(handlers.add_text, [name, text, chosen], api_name="add_text", **encoding)
    for button, (label, file, asked) in zip(buttons, EXAMPLES, strict=True):
        example = (label, (HERE / "examples" / file).read_text(encoding="utf-8"))
        values = [gr.State(value) for value in example]
        button.click(handlers.add_text, [*values, chosen], api_visibility="private", **encoding)
        button.click(lambda asked=asked: asked, outputs=question, api_visibility="private", queue=False)
    remove.click(handlers.remove, chosen, shown, api_name="remove", queue=False)
    chosen.input(handlers.toggle, chosen, costs, api_name="toggle", queue=False, show_progress="hidden")
    return chosen


def _answers(handlers: Handlers, question: gr.Textbox, chosen: gr.CheckboxGroup) -> None:
    """The right side: asking, both answers, what was attended to, charts."""
    compare = gr.Checkbox(True, label="Compare with the text in the prompt (slower)", container=False)
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", scale=3, min_width=120)
        stop = gr.Button("Stop", scale=1, min_width=80)
    with gr.Row(equal_height=False):
        with gr.Column(min_width=280):
            from_cache = gr.Textbox(label="Answer from the context cache", lines=4, elem_id="cache-answer")
            cache_figures = gr.HTML(elem_id="cache-figures")
        with gr.Column(min_width=280):
            from_prompt = gr.Textbox(label="Answer with the text in the prompt", lines=4, elem_id="prompt-answer")
            prompt_figures = gr.HTML(elem_id="prompt-figures")
    attended = gr.HTML(elem_id="attended")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=280):
            times = gr.HTML(figures.latency_chart([]), elem_id="times")
        with gr.Column(min_width=280):
            gr.HTML(figures.bytes_chart(handlers.reader.bytes_per_token), elem_id="bytes")
    said = gr.HTML(elem_id="said")

    asked = [ask.click, question.submit]
    # an old answer does not stand beside a new one
    gr.on(asked, lambda: ("", ""), outputs=[from_prompt, prompt_figures], api_visibility="private", queue=False)
    first = gr.on(
        asked,
        handlers.ask,
        [question, chosen],
        [from_cache, cache_figures, attended, times, said],
        api_name="ask",
        show_progress_on=from_cache,
        concurrency_id="ask",
    )
    second = first.then(
        handlers.ask_prompt,
        [question, chosen, compare],
        [from_prompt, prompt_figures, times, said],
        api_name="ask_prompt",
        show_progress_on=from_prompt,
        concurrency_id="ask_prompt",
    )
    stop.click(None, cancels=[first, second])
