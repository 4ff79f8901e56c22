"""XC-Llama on Gradio: documents are encoded once, questions are answered from the cache.

The model is the Hub id or folder in XCLLAMA_MODEL, else the first of `models:` in README.md.
"""

import os
import threading
import time
from pathlib import Path

# no usage statistics: neither Gradio's nor the Hub client's
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# PDF files are read by a process of their own: no threads of a tokenizer beside it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gradio as gr
from handlers import Handlers
from huggingface_hub import metadata_load
from page import build, launch_options
from reader import Reader
from transformers import AutoModelForCausalLM, AutoProcessor
from visitors import Visitors

SWEEP_SECONDS = 60


def model_name() -> str:
    """The Hub id or folder of the model."""
    card = metadata_load(Path(__file__).with_name("README.md"))
    return os.environ.get("XCLLAMA_MODEL") or card["models"][0]


def make_page(model, processor, visitors: Visitors | None = None) -> gr.Blocks:
    """The page for a model; a thread forgets visitors who are away."""
    visitors = visitors or Visitors()
    threading.Thread(target=_sweep, args=(visitors,), daemon=True).start()
    return build(Handlers(Reader(model.eval(), processor), visitors))


def _sweep(visitors: Visitors) -> None:
    while True:
        time.sleep(SWEEP_SECONDS)
        visitors.sweep()


if __name__ == "__main__":
    name = model_name()
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="auto")
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    make_page(model, processor).launch(**launch_options())
