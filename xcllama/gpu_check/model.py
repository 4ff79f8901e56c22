"""The model: first tokens from disk and from memory and the tokens after them, beside the prompt and a KV prefix.

Every row is a median of a few runs of `generate` on one context, which all rows of a batch read. That the kernels ran,
and that a step compiles as one graph, is asserted.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from xcllama_kernels.launch import launch_counts

from modeling_xcllama import XCLlamaForCausalLM
from modeling_xcllama.context_cache import ContextCache, ProjectedContext
from modeling_xcllama.decoding_speed import decoding_compile_config
from xcllama.gpu_check.options import MEASURED, Options, synchronize
from xcllama.gpu_check.tiny import PREFIX
from xcllama.provenance import ROOT, write_result
from xcllama.training.recipe import load_recipe

RECIPES = {"joint": "xc-smollm2-135m-gpu", "block": "xc-smollm2-135m-block"}
TINY = {"cross_attention_layers": [1, 3], "context_layer": 2}
# what may go wrong with one case and leave the others as they are: memory, or a compiler
FAILURES = (RuntimeError, ValueError, ImportError)
# an error of a compiled step, of its logits' norm, in 16 bits
TOLERANCE = 3e-2


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        contexts: lengths in tokens.
        batches: rows that read one context.
        question, new_tokens: tokens of each row.
        rounds: runs of each case.
        compiled: modes whose later tokens are also timed as one graph.
    """

    contexts: tuple[int, ...] = (4096, 16384)
    batches: tuple[int, ...] = (1, 64)
    question: int = 24
    new_tokens: int = 16
    rounds: int = 3
    compiled: tuple[str, ...] = tuple(RECIPES)


DRY = Sizes(contexts=(40,), batches=(2,), question=5, new_tokens=2, rounds=1, compiled=("joint",))


def check_model(options: Options) -> int:
    """Measure as much as the time allows, and write after every case; 0 if all that is asserted holds."""
    check = ModelCheck(options, DRY if options.dry_run else Sizes())
    for name, case in check.cases():
        if options.left < 0:
            check.left_out.append(name)
            continue
        check.run(name, case)
        figures = {"rows": check.rows, "asserted": check.asserted, "left_out": check.left_out}
        write_result(options.output / "model.json", figures, MEASURED, seed=0)
    wrong = [name for name, holds in check.asserted.items() if not holds]
    print(f"{len(check.rows)} cases, {len(check.left_out)} left out; broken: {wrong or 'nothing'}", flush=True)
    return 1 if wrong or not check.asserted else 0


class ModelCheck:
    """The models, and every case as a function."""

    def __init__(self, options: Options, sizes: Sizes):
        torch.manual_seed(0)
        self.options, self.sizes, self.device = options, sizes, options.device
        self.base = (
            AutoModelForCausalLM.from_pretrained(options.decoder(), dtype=torch.bfloat16).eval().to(self.device)
        )
        self.rows: list[dict[str, Any]] = []
        self.asserted: dict[str, bool] = {}
        self.left_out: list[str] = []
        self.models = {mode: self._model(mode) for mode in RECIPES}
        self.caches: dict[tuple[str, int], ContextCache] = {}

    def _model(self, mode: str) -> XCLlamaForCausalLM:
        fields: dict[str, Any] = TINY | ({"context_prefix": PREFIX} if mode == "joint" else {})
        if self.options.base is not None:
            recipe = ROOT / "xcllama" / "training" / "recipes" / f"{RECIPES[mode]}.yaml"
            fields = load_recipe(recipe).model.config
        fields = fields | {"cross_attention_mode": mode, "cross_attn_implementation": self.options.implementation}
        # untrained weights take as long as trained ones
        return XCLlamaForCausalLM.from_decoder(copy.deepcopy(self.base), init="random", **fields).eval()

    def cases(self) -> Iterator[tuple[str, Callable[[], dict[str, Any] | None]]]:
        """Names and functions, what matters most first."""
        for mode in self.models:
            yield f"{mode}: one graph", partial(self.one_graph, mode)
        for length in self.sizes.contexts:
            for batch in self.sizes.batches:
                for mode in self.models:
                    yield f"{mode}, {batch} x {length}", partial(self.cached, mode, batch, length)
                yield f"KV prefix, {batch} x {length}", partial(self.prefix, batch, length)
                yield f"prompt, {batch} x {length}", partial(self.prompt, batch, length)
        for length in self.sizes.contexts:
            for mode in self.sizes.compiled:
                for batch in self.sizes.batches:
                    yield f"{mode}, compiled, {batch} x {length}", partial(self.compiled, mode, batch, length)

    def run(self, name: str, case: Callable[[], dict[str, Any] | None]) -> None:
        """Run a case and keep its figures, or why it failed."""
        begin = time.monotonic()
        try:
            found = case()
        except FAILURES as failure:
            found = {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[:1]}"}
        if found is not None:
            self.rows.append({"case": name, **found, "took_seconds": round(time.monotonic() - begin, 2)})
            print(self.rows[-1], flush=True)

    def ids(self, rows: int, length: int) -> Tensor:
        """Random ids that no tokenizer treats as special."""
        generator = torch.Generator().manual_seed(length)
        return torch.randint(20, 250, (rows, length), generator=generator).to(self.device)

    def question(self, batch: int, model: PreTrainedModel) -> Tensor:
        """The question of every row; behind the model's prefix, as every prompt."""
        prefix = torch.tensor([getattr(model.config, "context_prefix", None) or []], dtype=torch.long).to(self.device)
        return torch.cat([prefix.expand(batch, -1), self.ids(batch, self.sizes.question)], dim=1)

    def generate(self, model: PreTrainedModel, ids: Tensor, new_tokens: int, **options) -> Tensor:
        """Greedy decoding of exactly `new_tokens`."""
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, eos_token_id=None, do_sample=False,
            pad_token_id=0, **options,
        )  # fmt: skip

    def seconds(self, function: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """Median of the seconds of a few calls, after one that is not counted; `before` each, out of the count."""
        found = []
        for _ in range(1 + self.sizes.rounds):
            before()
            synchronize(self.device)
            begin = time.perf_counter()
            function()
            synchronize(self.device)
            found.append(time.perf_counter() - begin)
        return median(found[1:])

    def tokens(self, make: Callable[[int], object]) -> dict[str, float]:
        """Milliseconds to the first token and for each after it, of `make(new_tokens)`."""
        first, all_of_them = self.seconds(lambda: make(1)), self.seconds(lambda: make(self.sizes.new_tokens))
        later = (all_of_them - first) / (self.sizes.new_tokens - 1)
        return {"first_token_ms": 1e3 * first, "token_ms": 1e3 * later}

    def cache(self, mode: str, length: int) -> ContextCache:
        """The encoded document, made once."""
        if (mode, length) not in self.caches:
            self.caches[mode, length] = self.models[mode].encode_context(self.ids(1, length))
        return self.caches[mode, length]

    def one_graph(self, mode: str) -> None:
        """`torch.compile(fullgraph=True)` gives the logits of the model itself, read by the kernels."""
        model, context = self.models[mode], self.project(mode, 1, 64)
        ids = self.question(1, model)
        torch.compiler.reset()
        # what breaks a graph breaks it before any backend; compiled steps are timed below
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad(), self.kernels_run(f"{mode}: kernels run in a graph"):
            expected = model(ids, context_cache=context, use_cache=False).logits.float()
            error = (compiled(ids, context_cache=context, use_cache=False).logits.float() - expected).norm()
        self.asserted[f"{mode}: one graph"] = bool(error <= TOLERANCE * expected.norm())

    @contextmanager
    def kernels_run(self, name: str) -> Iterator[None]:
        """Assert that the kernels are launched within."""
        before = launch_counts.total()
        yield
        self.asserted[name] = launch_counts.total() > before

    def project(self, mode: str, batch: int, length: int) -> ProjectedContext:
        """Keys and values for `batch` rows on one document; asserts which backend was taken."""
        context = self.models[mode].project_context(self.cache(mode, length).select([0] * batch))
        self.asserted[f"{mode}: {self.options.implementation} takes the kernels"] = context.implementation == "triton"
        return context

    def cached(self, mode: str, batch: int, length: int) -> dict[str, Any]:
        """From a file that is not in memory, from states on the device, from keys and values; then token by token."""
        model, cache = self.models[mode], self.cache(mode, length)
        ids, rows, path = self.question(batch, model), [0] * batch, self.options.output / "context.safetensors"
        cache.save(path)

        def from_disk() -> None:
            self.generate(model, ids, 1, context_cache=model.load_context(path).to(self.device).select(rows))

        projected = self.project(mode, batch, length)
        with self.kernels_run(f"{mode}: kernels run in generate"):
            figures = self.tokens(lambda count: self.generate(model, ids, count, context_cache=projected))
        memory = self.seconds(lambda: self.generate(model, ids, 1, context_cache=cache.select(rows)))
        encode = self.seconds(lambda: model.encode_context(self.ids(1, length)))
        found = {
            "mode": mode, "batch": batch, "context": length, "bytes": path.stat().st_size,
            "first_token_from_disk_ms": 1e3 * self.seconds(from_disk, before=lambda: drop_pages(path)),
            "first_token_from_memory_ms": 1e3 * memory,
            "first_token_from_keys_and_values_ms": figures["first_token_ms"],
            "token_ms": figures["token_ms"], "encode_ms": 1e3 * encode,
        }  # fmt: skip
        path.unlink()
        return found

    def compiled(self, mode: str, batch: int, length: int) -> dict[str, Any]:
        """Later tokens over a static cache, each step one compiled graph, which is a CUDA graph on a GPU."""
        model, context = self.models[mode], self.project(mode, batch, length)
        ids = self.question(batch, model)
        config = decoding_compile_config("eager" if self.options.dry_run else "inductor")
        config.fullgraph = True
        if not self.options.dry_run:
            config.mode = "reduce-overhead"
        options = {"context_cache": context, "cache_implementation": "static", "compile_config": config}
        torch.compiler.reset()
        figures = self.tokens(lambda count: self.generate(model, ids, count, **options))
        return {"mode": mode, "batch": batch, "context": length, "token_ms": figures["token_ms"]}

    def prompt(self, batch: int, length: int) -> dict[str, Any]:
        """The document in the prompt of every row."""
        ids = torch.cat([self.ids(1, length).expand(batch, -1), self.question(batch, self.base)], dim=1)
        return {"batch": batch, "context": length, **self.tokens(lambda count: self.generate(self.base, ids, count))}

    def prefix(self, batch: int, length: int) -> dict[str, Any]:
        """The decoder's own keys and values of the document, in memory and on disk; copied for every row."""
        document, path = self.ids(1, length), self.options.output / "prefix.safetensors"
        kept = DynamicCache(config=self.base.config)
        with torch.no_grad():
            self.base.model(document, past_key_values=kept)
        ids = torch.cat([document.expand(batch, -1), self.question(batch, self.base)], dim=1)
        save_file({f"{n}.{name}": getattr(layer, name).contiguous().cpu() for n, layer in enumerate(kept.layers)
                   for name in ("keys", "values")}, path)  # fmt: skip

        def answer(cache: DynamicCache, new_tokens: int) -> None:
            rows = copy.deepcopy(cache)
            rows.batch_repeat_interleave(batch)
            self.generate(self.base, ids, new_tokens, past_key_values=rows)

        def from_disk() -> None:
            tensors, cache = load_file(path, device=str(self.device)), DynamicCache(config=self.base.config)
            for layer in range(len(kept.layers)):
                cache.update(tensors[f"{layer}.keys"], tensors[f"{layer}.values"], layer)
            answer(cache, 1)

        figures = self.tokens(lambda count: answer(kept, count))
        found = {
            "batch": batch, "context": length, "bytes": path.stat().st_size,
            "first_token_from_memory_ms": figures["first_token_ms"], "token_ms": figures["token_ms"],
            "first_token_from_disk_ms": 1e3 * self.seconds(from_disk, before=lambda: drop_pages(path)),
        }  # fmt: skip
        path.unlink()
        return found


def drop_pages(path: Path) -> None:
    """Put a file out of the page cache: what reads it next waits for the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
