"""What every part of the benchmark shares: the models, the documents, clocks, memory and the limits of the machine."""

import ctypes
import gc
import json
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

import torch
from load_model import BASE, CHECKPOINT
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from modeling_xcllama import XCLlamaForCausalLM
from modeling_xcllama.checkpoints import find_model
from modeling_xcllama.wide_products import has_native_products
from xcllama.models import load_model

SEED = 0
QUESTION = "Who was the architect of the bridge, and when was it built?"
PAPER_BLOCK = {
    "cross_attention_intermediate_size": 2304,
    "cross_attention_norm": "layer_norm",
    "cross_attention_context_norm": False,
    "cross_attention_rope": True,
    "cross_attention_gate": None,
}


class Clock(BaseStreamer):
    """Notes when tokens arrive; `generate` sends the prompt first, and a verified draft at once."""

    def __init__(self):
        self.start, self.calls, self.arrivals = time.perf_counter(), 0, []

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls > 1:
            self.arrivals += [time.perf_counter()] * (value.shape[1] if value.dim() == 2 else 1)

    def end(self) -> None:
        """Nothing to close."""

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.start

    @property
    def steps(self) -> list[float]:
        """Seconds between tokens; a token that came with another counts as none."""
        return [after - before for before, after in pairwise(self.arrivals)]


class Models:
    """The base that reads prompts; the checkpoint that ships, and untrained siblings: condensed, the paper's block."""

    def __init__(self):
        torch.manual_seed(SEED)
        # what is compared with has no products of its own: it runs in what the CPU multiplies fastest
        self.dtype = torch.bfloat16 if has_native_products(torch.bfloat16) else torch.float32
        self.base = AutoModelForCausalLM.from_pretrained(find_model(BASE), dtype=self.dtype).eval()
        self.own = own = AutoModelForCausalLM.from_pretrained(find_model(BASE), dtype="auto").eval()
        self.hidden, self.processor = load_model(CHECKPOINT, base=own)
        config = self.hidden.config
        fields = {"context_layer": config.context_layer, "cross_attention_layers": config.cross_attention_layers}
        self.condensed = XCLlamaForCausalLM.from_decoder(own, cross_attention_share_key_value=True, **fields)
        self.paper = XCLlamaForCausalLM.from_decoder(own, init="random", **PAPER_BLOCK, **fields)
        for model in (self.condensed, self.paper):
            model.eval()
        self.question = self.processor(text=[QUESTION], return_tensors="pt")["input_ids"]
        self.text_ids = self.processor.tokenizer(read_text(), return_tensors="pt")["input_ids"][0]

    def document(self, num_tokens: int, start: int = 0) -> torch.Tensor:
        """`num_tokens` ids of the passages from token `start` on, over and over, `[1, num_tokens]`."""
        return self.text_ids[(torch.arange(num_tokens) + start) % len(self.text_ids)][None]


def read_text() -> str:
    """The four passages of the demo, one after the other."""
    folder = Path(__file__).parent / "passages"
    return "\n\n".join(json.loads(path.read_text())["text"] for path in sorted(folder.glob("*.json")))


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles of `values`."""
    low, high = (quantiles(values, n=4)[::2]) if len(values) > 1 else (values[0], values[0])
    return {"median": median(values), "low": low, "high": high, "count": len(values)}


def seconds_of(function: Callable, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls."""
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
    return found


def drop_pages(path: Path) -> None:
    """Put a file out of the page cache: what reads it next waits for the disk."""
    gc.collect()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_bytes(function: Callable) -> int:
    """How far resident memory rises during a call over its level before."""
    gc.collect()
    # what was freed goes back to the system: else the call would live in it unseen
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # resets the peak that the kernel keeps (proc(5))
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_limits(models: Models) -> dict:
    """Bandwidth of reading memory and rate of matrix products on all threads; what a step and a token must cost."""
    block = torch.ones(256 * 2**20 // 4)
    read = block.nbytes / min(seconds_of(block.sum, 7))
    left, right = (torch.randn(2048, 2048, dtype=models.dtype) for _ in range(2))
    products = 2 * 2048**3 / min(seconds_of(lambda: left @ right, 9))
    base = models.own
    # the input embedding is looked up, not read; tied, it is the head
    weights = sum(parameter.nbytes for parameter in base.parameters())
    added = sum(parameter.nbytes for name, parameter in models.hidden.added_parameters() if "projections" not in name)
    config = models.hidden.config
    num_layers = config.context_layer or config.num_hidden_layers
    linear = sum(weight.numel() for weight in base.model.layers[0].parameters() if weight.dim() == 2) * num_layers
    return {
        "memory_read_gb_per_second": read / 1e9,
        "matrix_product_gflop_per_second": products / 1e9,
        "weights_bytes": weights + added,
        "encode_flop_per_token": 2 * linear,
        # of causal attention: half of all pairs, in two products
        "encode_flop_per_pair": 2 * num_layers * config.num_attention_heads * config.head_dim,
        "products_of_one_token_seconds": measure_products(base),
        "threads": torch.get_num_threads(),
        "dtype": str(models.dtype).removeprefix("torch."),
    }


def measure_products(base) -> dict[str, float]:
    """Seconds that the products of one token take: torch's, int8 weights."""
    weights = [module.weight.detach() for module in base.modules() if isinstance(module, torch.nn.Linear)]
    tokens = {size: torch.randn(1, size, dtype=weights[0].dtype) for size in {weight.shape[1] for weight in weights}}

    def plain() -> None:
        for weight in weights:
            torch.nn.functional.linear(tokens[weight.shape[1]], weight)

    found = {"torch": median(seconds_of(plain, 7))}
    if base.dtype == torch.bfloat16:
        packed = [((weight * 100).round().clamp(-127, 127).to(torch.int8), weight[:, 0]) for weight in weights]

        def integers() -> None:
            for weight, scale in packed:
                torch._weight_int8pack_mm(tokens[weight.shape[1]], weight, scale.contiguous())

        found["int8 weights"] = median(seconds_of(integers, 7))
    return found
