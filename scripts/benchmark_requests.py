"""One request at a time: ours from every place a cache can be in, and what a user would pick instead."""

import gc
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark_setup import Clock, Models, drop_pages, peak_bytes, seconds_of, spread
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from modeling_xcllama.decoding_speed import decoding_compile_config

NEW_TOKENS = 16


def generate(model, ids: torch.Tensor, new_tokens: int = NEW_TOKENS, **options) -> Clock:
    """Greedy decoding of exactly `new_tokens`, timed at the streamer."""
    clock = Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        # a minimum of tokens would copy all logits of a step
        eos_token_id=None,
        do_sample=False,
        streamer=clock,
        **options,
    )
    return clock


def prefix_cache(models: Models, ids: torch.Tensor) -> DynamicCache:
    """The decoder's own keys and values of `ids`, `[1, length]`."""
    cache = DynamicCache(config=models.base.config)
    with torch.no_grad():
        models.base.model(ids, past_key_values=cache)
    return cache


def save_prefix(cache: DynamicCache, path: Path) -> None:
    """Write keys and values of every layer."""
    tensors = {}
    for index, layer in enumerate(cache.layers):
        tensors |= {f"{index}.key": layer.keys.contiguous(), f"{index}.value": layer.values.contiguous()}
    save_file(tensors, path)


def load_prefix(models: Models, path: Path) -> DynamicCache:
    """Map what `save_prefix` wrote."""
    cache = DynamicCache(config=models.base.config)
    with safe_open(path, framework="pt") as file:
        for index in range(models.base.config.num_hidden_layers):
            cache.update(file.get_tensor(f"{index}.key"), file.get_tensor(f"{index}.value"), index)
    return cache


def pressed_cache(models: Models, ids: torch.Tensor) -> DynamicCache:
    """The decoder's keys and values of `ids` `[1, length]`, half of them dropped by kvpress (smallest norms kept)."""
    # needs an older transformers to install by itself: only where someone put it
    from kvpress import KnormPress

    cache = DynamicCache(config=models.base.config)
    with torch.no_grad(), KnormPress(compression_ratio=0.5)(models.base):
        # what kvpress tells a prefill by; transformers 5 no longer passes it
        models.base.model(ids, past_key_values=cache, cache_position=torch.arange(ids.shape[1]))
    return cache


class Requests:
    """All ways to answer the question from one document of `num_tokens`."""

    def __init__(self, models: Models, num_tokens: int, folder: Path):
        self.models, self.num_tokens, self.folder = models, num_tokens, folder
        self.document = models.document(num_tokens)
        self.whole_prompt = torch.cat([self.document, models.question], dim=1)
        self.caches, self.files, self.sizes, self.projected = {}, {}, {}, {}
        for layout, dtypes in (("hidden", ("int8", "int4")), ("condensed", ("int8", "int4")), ("paper", ())):
            model = getattr(models, layout)
            cache = model.encode_context(self.document)
            for dtype in ("16-bit", *dtypes):
                made = cache if dtype == "16-bit" else cache.quantize(dtype)
                name = f"{layout} {dtype}"
                self.files[name], self.caches[name] = folder / f"{name.replace(' ', '_')}.safetensors", made
                made.save(self.files[name])
                report = model.project_context(made).memory_report()
                resident = report.key_value_bytes + (report.state_bytes if layout == "condensed" else 0)
                self.sizes[name] = {"file_bytes": self.files[name].stat().st_size, "resident_bytes": resident}
        self.prefix_file = folder / "prefix.safetensors"

    def ours(self, name: str, source: str) -> Clock:
        """Answer from `name` ("hidden int8") in `source`: file cold, file warm, memory or projected."""
        model = getattr(self.models, name.split()[0])
        if source == "file cold":
            drop_pages(self.files[name])
        if source == "projected":
            if name not in self.projected:
                self.projected[name] = model.project_context(self.caches[name])
            return generate(model, self.models.question, context_cache=self.projected[name])
        start = time.perf_counter()
        context = self.caches[name] if source == "memory" else model.load_context(self.files[name])
        clock = generate(model, self.models.question, context_cache=context)
        clock.start = start
        return clock

    def prompt(self) -> Clock:
        """Transformers with the text in the prompt; its steps are those of any KV cache of this length."""
        return generate(self.models.base, self.whole_prompt)

    def prefix(self, source: str) -> Clock:
        """Transformers from the KV cache of the document, kept in memory or saved."""
        if source == "file cold":
            drop_pages(self.prefix_file)
        start = time.perf_counter()
        if source != "memory":
            return self._after(load_prefix(self.models, self.prefix_file), start)
        return self._after(self.prefix_in_memory, start)

    def _after(self, cache: DynamicCache, start: float) -> Clock:
        """Transformers over the keys and values of `cache`, which stays as it is."""
        kept = cache.get_seq_length()
        # as many ids as keys: generate takes the others for the question
        ids = torch.cat([self.document[:, :kept], self.models.question], dim=1)
        clock = generate(self.models.base, ids, past_key_values=cache)
        clock.start = start
        cache.crop(kept - cache.get_seq_length())
        return clock

    def cases(self, quick: bool) -> dict[str, Callable[[], Clock]]:
        """Every case of one round by name; cold ones first, as the others leave their pages in memory."""
        names = ["hidden 16-bit", "condensed 16-bit", "paper 16-bit", "hidden int8", "condensed int8"]
        names += [] if quick else ["hidden int4", "condensed int4"]
        cases = {}
        for name in names:
            sources = ("file cold", "file warm", "memory", "projected")
            for source in sources if name in names[:2] or not quick else sources[1:2]:
                cases[f"{name}, {source}"] = lambda name=name, source=source: self.ours(name, source)
        for source in ("file cold", "file warm", "memory"):
            cases[f"KV prefix, {source}"] = lambda source=source: self.prefix(source)
        if importlib.util.find_spec("kvpress"):
            pressed = pressed_cache(self.models, self.document)
            cases["kvpress at 50 %, memory"] = lambda: self._after(pressed, time.perf_counter())
        return cases

    def measure(self, rounds: int, prompt_rounds: int, quick: bool) -> dict:
        """Seconds to the first token and between tokens of every case, the cases in turns."""
        self.prefix_in_memory = prefix_cache(self.models, self.document)
        save_prefix(self.prefix_in_memory, self.prefix_file)
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.prefix_in_memory.layers)
        sizes = {
            "KV prefix": {"resident_bytes": kv_bytes, "file_bytes": self.prefix_file.stat().st_size},
            "kvpress at 50 %": {"resident_bytes": kv_bytes // 2},
            "text in the prompt": {"resident_bytes": kv_bytes},
        } | self.sizes
        cases = self.cases(quick)
        clocks = {name: [] for name in (*cases, "text in the prompt")}
        for _ in range(rounds):
            for name, case in cases.items():
                clocks[name].append(case())
        del cases, self.prefix_in_memory
        gc.collect()
        for _ in range(prompt_rounds):
            clocks["text in the prompt"].append(self.prompt())
        return {
            name: {
                "first_token_seconds": spread([clock.first for clock in taken]),
                # the first step after the prefill warms up
                "step_seconds": spread([step for clock in taken for step in clock.steps[1:]]),
                **sizes.get(name.split(",")[0], {}),
            }
            for name, taken in clocks.items()
        }

    def compiled(self) -> dict:
        """Static cache and torch.compile: ours on a projected context, theirs over the prompt's KV cache."""
        options = {"cache_implementation": "static", "compile_config": decoding_compile_config()}
        model = self.models.hidden
        context = model.project_context(self.caches["hidden 16-bit"])
        runs = {
            "hidden 16-bit, compiled": lambda: generate(model, self.models.question, context_cache=context, **options),
            "text in the prompt, compiled": lambda: generate(self.models.base, self.whole_prompt, **options),
        }
        found = {}
        for name, run in runs.items():
            compiling = seconds_of(run, 1)[0]
            steps = run().steps[1:]
            found[name] = {"step_seconds": spread(steps), "first_call_seconds": compiling}
        return found

    def cross_attention(self, steps: int = 6) -> dict:
        """Seconds of the paper's blocks in a step: with ready keys and values, and projecting them each time."""
        model, entered, left = self.models.paper, [], []
        handles = []
        for block in model.model.cross_attention_blocks:
            handles.append(block.register_forward_pre_hook(lambda *_: entered.append(time.perf_counter())))
            handles.append(block.register_forward_hook(lambda *_: left.append(time.perf_counter())))
        cache, found = self.caches["paper 16-bit"], {"projected once": [], "projected at every step": []}
        projected = model.project_context(cache)
        past = DynamicCache(config=model.config)

        def project_as_the_original() -> None:
            for projection in model.model.context_projections:
                projection(cache.states["hidden"])

        with torch.no_grad():
            model(self.models.question, past_key_values=past, context_cache=projected)
            token = self.models.question[:, -1:]
            for _ in range(steps):
                for name, seconds in found.items():
                    entered.clear()
                    left.clear()
                    projecting = 0.0
                    if name == "projected at every step":
                        projecting = seconds_of(project_as_the_original, 1)[0]
                    model(token, past_key_values=past, context_cache=projected)
                    seconds.append(sum(left) - sum(entered) + projecting)
        for handle in handles:
            handle.remove()
        return {name: spread(seconds) for name, seconds in found.items()}

    def peaks(self) -> dict:
        """Peak of resident memory of one request, over what was there before it."""
        model = self.models.hidden
        cache = model.load_context(self.files["hidden 16-bit"])
        runs = {
            "hidden 16-bit, file warm": lambda: generate(model, self.models.question, 4, context_cache=cache),
            "KV prefix, file warm": lambda: generate(
                self.models.base, self.whole_prompt, 4, past_key_values=load_prefix(self.models, self.prefix_file)
            ),
            "text in the prompt": lambda: generate(self.models.base, self.whole_prompt, 4),
        }
        return {name: peak_bytes(run) for name, run in runs.items()}

    def encode_seconds(self, repeats: int = 2) -> dict:
        """Encoding the document, which requests have to pay for once."""
        return spread(seconds_of(lambda: self.models.hidden.encode_context(self.document), repeats))
