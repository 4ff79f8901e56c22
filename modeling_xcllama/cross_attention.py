"""Cross-attention of queries to packed contexts: eager, sdpa and triton, one signature, one lookup.

Knows tensors only. Keys and values hold all contexts back to back; `ContextRows` says which tokens a row reads. Keys
and values may be `QuantizedTensor`s: they are then dequantized block by block inside the attention, never as a whole.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils import logging

from .wide_products import has_native_products

logger = logging.get_logger(__name__)

# what `scaled_dot_product_attention` runs on a CPU; by itself it gives the log of the normalizer, too
_FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# tokens dequantized at a time
BLOCK_TOKENS = 2048
# queries of one KV head up to which two products beat flash attention on a CPU
PRODUCT_QUERIES = 256


class RowTensors(NamedTuple):
    """`ContextRows` on a device.

    Args:
        offsets, context_index: int32, what a kernel takes.
        order: int32 `[batch]`, see `ContextRows.order`.
        reads: bool `[batch]`, the rows that have a context; None: all.
        longest: int32 `[batch]`, tokens of the longest document of each row's context.
    """

    offsets: Tensor
    context_index: Tensor
    order: "Tensor | None"
    reads: "Tensor | None"
    longest: Tensor


@dataclass(frozen=True)
class ContextRows:
    """Which packed tokens each row reads, on the host and as the tensors a kernel takes; derived once.

    Args:
        offsets: first token of each context and the end of the last, `num_contexts + 1` values.
        context_index: the context of each row.
        longest: tokens of the longest document of each context, None: contexts are single documents. A row's own
            tokens come after it (joint reading).
    """

    offsets: tuple[int, ...]
    context_index: tuple[int, ...]
    longest: tuple[int, ...] | None = None
    _placed: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.context_index)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens that each row reads."""
        return [self.offsets[context + 1] - self.offsets[context] for context in self.context_index]

    @cached_property
    def groups(self) -> list[tuple[int, int, list[int]]]:
        """(start, end, rows) of every context that is read and not empty: rows of one context are served together."""
        rows_of: dict[int, list[int]] = {}
        for row, context in enumerate(self.context_index):
            rows_of.setdefault(context, []).append(row)
        spans = [(self.offsets[context], self.offsets[context + 1], rows) for context, rows in rows_of.items()]
        return [span for span in spans if span[0] < span[1]]

    @cached_property
    def share_all(self) -> bool:
        """Whether every row reads all tokens: one attention call, no slices."""
        return [(start, end) for start, end, _ in self.groups] == [(0, self.offsets[-1])] and not self.some_empty

    @cached_property
    def some_empty(self) -> bool:
        """Whether a row reads nothing."""
        return not all(self.lengths)

    @cached_property
    def order(self) -> tuple[int, ...] | None:
        """Where each row stands when the rows of `groups` follow each other; None: in their own order, all of them."""
        served = [row for _, _, rows in self.groups for row in rows]
        if served == list(range(len(self))):
            return None
        position = {row: place for place, row in enumerate(served)}
        # a row without a context stands behind them
        return tuple(position.get(row, len(served)) for row in range(len(self)))

    def tensors(self, device: torch.device) -> RowTensors:
        """The rows on `device`, the same objects at every call: kernels check each tensor once, and compiled steps
        take them as inputs."""
        if device not in self._placed:

            def place(values: Iterable[int], dtype: torch.dtype = torch.int32) -> Tensor:
                # kept for later calls, which may want gradients
                with torch.inference_mode(False):
                    return torch.tensor(tuple(values), dtype=dtype, device=device)

            longest = self.lengths if self.longest is None else [self.longest[i] for i in self.context_index]
            self._placed[device] = RowTensors(
                place(self.offsets),
                place(self.context_index),
                None if self.order is None else place(self.order),
                place((length > 0 for length in self.lengths), torch.bool) if self.some_empty else None,
                place(longest),
            )
        return self._placed[device]


def _fold(query: Tensor, num_key_value_heads: int) -> Tensor:
    """`[rows, query_len, num_heads, dim]` -> `[kv_heads, rows * query_len * group, dim]`: what reads one KV head."""
    rows, length, heads, dim = query.shape
    query = query.view(rows, length, num_key_value_heads, heads // num_key_value_heads, dim)
    return query.permute(2, 0, 1, 3, 4).reshape(num_key_value_heads, -1, dim)


def _unfold(output: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_fold`, for any width of `output`."""
    rows, length, heads, _ = like.shape
    output = output.view(output.shape[0], rows, length, heads // output.shape[0], -1)
    return output.permute(1, 2, 0, 3, 4).reshape(rows, length, heads, -1)


def _take(query: Tensor, members: list[int]) -> Tensor:
    """The rows `members`, in rising order, without a copy where they follow each other."""
    first, last = members[0], members[-1]
    return query[first : last + 1] if last - first + 1 == len(members) else query[members]


def _attend_eager(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor]:
    scores = (query @ key.transpose(-1, -2)).float() * scale
    return (scores.softmax(-1).to(value.dtype) @ value,)


def _attend_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return (query * scale @ key.transpose(-1, -2)).softmax(-1) @ value


def _few_on_cpu(query: Tensor) -> bool:
    """Whether a step or a question is read in native bfloat16 on a CPU: flash attention takes twice as long."""
    small = query.shape[1] <= PRODUCT_QUERIES and query.dtype == torch.bfloat16 and query.device.type == "cpu"
    here = small and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return here and has_native_products(query.dtype)


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if _few_on_cpu(query):
        return _attend_products(query, key, value, scale)
    return functional.scaled_dot_product_attention(query[None], key[None], value[None], scale=scale)[0]


def attend_with_lse(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None):
    """`softmax(query key^T * scale + mask) value` and the log of its normalizer, in plain matrix products.

    Args:
        query: `[..., length, dim]`.
        key, value: `[..., num_tokens, dim]`.
        mask: added to the scores, None: all tokens are read.

    Returns:
        Output like `query`, and float32 `[..., length, 1]`.
    """
    scores = (query * scale @ key.transpose(-1, -2)).float()
    if mask is not None:
        scores = scores + mask
    normalizer = scores.logsumexp(-1, keepdim=True)
    return (scores - normalizer).exp().to(value.dtype) @ value, normalizer


def _attend_flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `attend_with_lse`; no gradient reaches it through the normalizer."""
    # it reads whole heads, whatever the strides say
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    output, normalizer = _FLASH_ON_CPU(query[None], key[None], value[None], scale=scale)
    return output[0], normalizer[0, ..., None]


def _attend_quantized(query: Tensor, key, value, scale: float) -> tuple[Tensor, Tensor]:
    """As `attend_with_lse`, by online softmax over blocks of tokens: only one block is ever dequantized."""
    accumulated, normalizer, highest = 0.0, 0.0, query.new_full((*query.shape[:2], 1), -torch.inf, dtype=torch.float32)
    for start in range(0, key.shape[0], BLOCK_TOKENS):
        tokens = slice(start, start + BLOCK_TOKENS)
        scores = (query.float() @ key[tokens].dequantize(torch.float32).permute(1, 2, 0)) * scale
        raised = torch.maximum(highest, scores.amax(-1, keepdim=True))
        weights, decay = (scores - raised).exp(), (highest - raised).exp()
        values = value[tokens].dequantize(torch.float32).transpose(0, 1)
        accumulated = accumulated * decay + weights @ values
        normalizer, highest = normalizer * decay + weights.sum(-1, keepdim=True), raised
    return (accumulated / normalizer).to(query.dtype), highest + normalizer.log()


def _over_groups(attend: Callable, query: Tensor, key, value, rows: ContextRows, scale: float) -> tuple[Tensor, ...]:
    """Run `attend` once a distinct context, on the queries of all rows that read it.

    Returns:
        What `attend` returns, by row: the output (zeros for a row without a context), and the log of the normalizer
        (-inf for such a row) where `attend` gives it.
    """

    def read(queries: Tensor, keys, values) -> tuple[Tensor, ...]:
        folded = _fold(queries, keys.shape[1])
        if isinstance(keys, Tensor):
            parts = attend(folded, keys.transpose(0, 1), values.transpose(0, 1), scale)
        else:
            parts = _attend_quantized(folded, keys, values, scale)
        return tuple(_unfold(part, queries) for part in parts)

    if rows.share_all:
        return read(query, key, value)
    pieces = [read(_take(query, members), key[start:end], value[start:end]) for start, end, members in rows.groups]
    if rows.some_empty:
        nothing = query.new_full((1, *query.shape[1:3], 1), -torch.inf, dtype=torch.float32)
        pieces.append((torch.zeros_like(query[:1]), nothing))
    # where no context is read at all, there is the log of no normalizer to leave out
    outputs = tuple(torch.cat(part) for part in zip(*pieces, strict=False))
    order = rows.tensors(query.device).order
    return outputs if order is None else tuple(part[order] for part in outputs)


def eager_cross_attention(query: Tensor, key, value, rows: ContextRows, scale: float) -> Tensor:
    """The reference: softmax(query key^T * scale) value, in plain matrix products."""
    return _over_groups(_attend_eager, query, key, value, rows, scale)[0]


def sdpa_cross_attention(query: Tensor, key, value, rows: ContextRows, scale: float) -> Tensor:
    """`scaled_dot_product_attention`, one call a distinct context, no mask and no padding."""
    return _over_groups(lambda *inputs: (_attend_sdpa(*inputs),), query, key, value, rows, scale)[0]


def triton_cross_attention(query: Tensor, key, value, rows: ContextRows, scale: float) -> Tensor:
    """The Triton kernels, looked up once (see `find_kernels`)."""
    return _by_kernels("cross_attention", query, key, value, rows, scale)


def cross_attention_with_lse(
    query: Tensor, key, value, rows: ContextRows, scale: float, implementation: str
) -> tuple[Tensor, Tensor]:
    """Cross-attention and the log of its normalizer, with which other tokens' attention can be merged.

    Returns:
        The output, and float32 `[batch, query_len, num_heads, 1]`, -inf for a row without a context.
    """
    if implementation != "triton":
        flash = implementation == "sdpa" and query.device.type == "cpu" and not torch.is_grad_enabled()
        attend = _attend_flash if flash and not _few_on_cpu(query) else attend_with_lse
        return _over_groups(attend, query, key, value, rows, scale)
    output, lse = _by_kernels("cross_attention_with_lse", query, key, value, rows, scale)
    return output, lse.transpose(1, 2).unsqueeze(-1)


def _by_kernels(function: str, query: Tensor, key, value, rows: ContextRows, scale: float):
    offsets, context_index, *_ = rows.tensors(query.device)
    scales = {}
    if not isinstance(key, Tensor):
        if not read_by_kernels(key):
            raise ValueError("the kernels read no quantized keys with RoPE; use cross_attn_implementation='sdpa'.")
        scales = {"key_scale": key.scale, "key_zero": key.zero, "value_scale": value.scale, "value_zero": value.zero}
        key, value = key.data, value.data
    kernel = getattr(find_kernels(), function)
    return kernel(query, key, value, offsets, context_index, scale=scale, **scales)


CROSS_ATTENTION_FUNCTIONS: dict[str, Callable] = {
    "eager": eager_cross_attention,
    "sdpa": sdpa_cross_attention,
    "triton": triton_cross_attention,
}

_kernels: list = []


def find_kernels():
    """The kernel package: `$LOCAL_KERNELS` override, Hub kernel named by `$XCLLAMA_KERNEL`, installed package.

    Raises:
        ImportError: none of them is there; the message has the commands that install one.
    """
    if not _kernels:
        repo_id = os.environ.get("XCLLAMA_KERNEL", "xcllama/xcllama-kernels")
        # named by the user in the environment: that is the consent to run its code
        named = "XCLLAMA_KERNEL" in os.environ or f"{repo_id}=" in os.environ.get("LOCAL_KERNELS", "")
        package = "kernels" if named else "xcllama_kernels"
        missing = [name for name in ("triton", package) if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(
                f"`cross_attn_implementation='triton'` needs {' and '.join(missing)}: "
                f"`pip install triton {'kernels' if named else 'xcllama'}`, or name a Hub kernel in the environment "
                "variable XCLLAMA_KERNEL; or use 'sdpa'."
            )
        if named:
            get_kernel = importlib.import_module("kernels").get_kernel
            module, source = get_kernel(repo_id, version=1, trust_remote_code=True), repo_id
        else:
            module, source = importlib.import_module(package), f"the installed package {package}"
        logger.info(f"cross-attention kernels: {source}")
        _kernels.append(module)
    return _kernels[0]


def kernels_installed() -> bool:
    """Whether `find_kernels` finds kernels; what is missing is said once."""
    try:
        return find_kernels() is not None
    except ImportError as error:
        logger.warning_once(f"cross_attn_implementation='auto' takes 'sdpa' on this GPU: {error}")
        return False


def read_by_kernels(key) -> bool:
    """Whether the kernels read `key`: tensors and quantized tensors, not quantized keys that are rotated when read."""
    return isinstance(key, Tensor) or hasattr(key, "scale")


def resolve_implementation(name: str, device: torch.device, key=None) -> str:
    """The backend that `name` means on `device`: "auto" takes triton on a GPU where it is installed and reads `key`,
    else sdpa.

    Raises:
        ValueError: `name` is no backend.
        ImportError: "triton" was asked for and is not installed.
    """
    if name == "auto":
        readable = key is None or read_by_kernels(key)
        return "triton" if device.type == "cuda" and readable and kernels_installed() else "sdpa"
    if name not in CROSS_ATTENTION_FUNCTIONS:
        allowed = ", ".join(map(repr, ("auto", *CROSS_ATTENTION_FUNCTIONS)))
        raise ValueError(f"`cross_attn_implementation` must be one of {allowed}, got {name!r}.")
    if name == "triton":
        find_kernels()
    return name


def log_implementation(name: str, device: torch.device) -> None:
    """Check the choice of a backend once, at load, and say what "auto" took."""
    taken = resolve_implementation(name, device)
    if name == "auto":
        logger.info(f"cross_attn_implementation='auto' takes {taken!r} on {device}")


def cross_attention_weights(query: Tensor, key, rows: ContextRows, scale: float) -> Tensor:
    """Attention weights of every row over its own context, for inspection.

    Returns:
        float32 `[batch, num_heads, query_len, longest context]`, zeros past the end of a row's context.
    """
    longest = max(rows.lengths, default=0)
    batch, length, heads, _ = query.shape
    weights = query.new_zeros((batch, heads, length, longest), dtype=torch.float32)
    for start, end, members in rows.groups:
        folded = _fold(query[members], key.shape[1])
        # by blocks: quantized keys are never dequantized as a whole
        scores = []
        for first in range(start, end, BLOCK_TOKENS):
            block = key[first : min(end, first + BLOCK_TOKENS)]
            block = block if isinstance(block, Tensor) else block.dequantize(query.dtype)
            scores.append((folded @ block.permute(1, 2, 0)).float() * scale)
        scores = torch.cat(scores, dim=-1).softmax(-1)
        scores = scores.view(key.shape[1], len(members), length, -1, end - start).permute(1, 0, 3, 2, 4)
        weights[members, ..., : end - start] = scores.reshape(len(members), heads, length, end - start)
    return weights
