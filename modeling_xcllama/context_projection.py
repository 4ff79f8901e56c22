"""From the states of a cache to keys and values: which tokens each row reads, projection by blocks, RoPE on keys."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from .cross_attention import BLOCK_TOKENS, ContextRows, find_kernels
from .cross_attention_block import StateRMSNorm, rotate
from .quantized_tensor import QuantizedTensor


@dataclass(frozen=True)
class ReadingPlan:
    """Which tokens of a cache are projected, and which of those each row reads.

    Args:
        tokens: the cache's tokens to project: those of every document that is read, once.
        repeat: indices into them in the order in which the rows read, None: as they are.
        rows: offsets and row indices of the result.
        positions: of each of `tokens` in its own document, int32.
    """

    tokens: "slice | Tensor"
    repeat: Tensor | None
    rows: ContextRows
    positions: Tensor

    @classmethod
    def of(cls, offsets: tuple[int, ...], rows: Iterable[tuple[int, ...]]) -> "ReadingPlan":
        """The plan for `rows` of document numbers; equal rows share one span of tokens."""
        rows = tuple(rows)
        distinct = list(dict.fromkeys(rows))
        flat = [document for row in distinct for document in row]
        unique = list(dict.fromkeys(flat))
        sizes = {document: offsets[document + 1] - offsets[document] for document in unique}
        starts = dict(zip(unique, accumulate(sizes.values(), initial=0), strict=False))
        repeat = None
        if flat != unique:
            repeat = torch.cat([torch.arange(starts[d], starts[d] + sizes[d]) for d in flat])
        spans = tuple(accumulate((sum(sizes[document] for document in row) for row in distinct), initial=0))
        index = {row: position for position, row in enumerate(distinct)}
        longest = tuple(max((sizes[document] for document in row), default=0) for row in distinct)
        context_rows = ContextRows(spans, tuple(index[row] for row in rows), longest)
        positions = torch.cat([torch.arange(size, dtype=torch.int32) for size in (0, *sizes.values())])
        return cls(document_tokens(offsets, unique), repeat, context_rows, positions)

    def drop_tokens(self, probability: float, device: torch.device) -> "ReadingPlan":
        """Leave out whole context tokens at random (training); a context keeps its first token at least."""
        offsets = self.rows.offsets
        keep = torch.rand(offsets[-1], device=device) >= probability
        keep[[start for start, end in zip(offsets[:-1], offsets[1:], strict=True) if start < end]] = True
        kept = keep.cumsum(0).tolist()
        new_offsets = tuple(0 if offset == 0 else kept[offset - 1] for offset in offsets)
        index = keep.nonzero().squeeze(1)
        repeat = index if self.repeat is None else self.repeat.to(device)[index]
        return replace(self, repeat=repeat, rows=replace(self.rows, offsets=new_offsets))


def document_tokens(offsets: tuple[int, ...], documents: list[int]) -> "slice | Tensor":
    """Where the tokens of `documents` lie: a slice if they follow each other, else indices."""
    if not documents:
        return slice(0, 0)
    if documents == list(range(documents[0], documents[0] + len(documents))):
        return slice(offsets[documents[0]], offsets[documents[-1] + 1])
    return torch.cat([torch.arange(offsets[document], offsets[document + 1]) for document in documents])


def project_hidden(
    hidden, projections: nn.ModuleList, dtype: torch.dtype, implementation: str
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every projection; a quantized state is dequantized in registers, or a block at a time."""
    if isinstance(hidden, Tensor):
        return _project_all(hidden.to(dtype), projections)
    norm = projections[0].norm
    plain = all(type(linear.weight) is nn.Parameter for part in projections for linear in (part.k_proj, part.v_proj))
    fusible = plain and (norm is None or (isinstance(norm, StateRMSNorm) and norm.num_parts == 1))
    if implementation == "triton" and fusible and not torch.is_grad_enabled():
        return [_project_fused(hidden, projection) for projection in projections]
    parts = []
    for start in range(0, max(1, hidden.shape[0]), BLOCK_TOKENS):
        block = hidden[start : start + BLOCK_TOKENS].dequantize(dtype).flatten(1)
        parts.append(_project_all(block, projections))
    return [tuple(torch.cat(pieces) for pieces in zip(*pairs, strict=True)) for pairs in zip(*parts, strict=True)]


def _project_all(states: Tensor, projections: nn.ModuleList) -> list[tuple[Tensor, Tensor]]:
    norm, normalized = projections[0].norm, None
    # offloaded weights are there only while their module runs
    if isinstance(norm, StateRMSNorm) and not norm.weight.is_meta and len(projections) > 1:
        normalized = norm.normalize(states)
    return [projection(states, normalized) for projection in projections]


def by_head(states: Tensor) -> Tensor:
    """`[num_tokens, kv_heads, head_dim]` laid out head by head: what attention reads is then contiguous."""
    return states.transpose(0, 1).contiguous().transpose(0, 1)


def _project_fused(hidden: QuantizedTensor, projection: nn.Module) -> tuple[Tensor, Tensor]:
    norm = {}
    if projection.norm is not None:
        norm = {"norm_weight": projection.norm.weight, "norm_eps": projection.norm.variance_epsilon}
    project = find_kernels().project_quantized
    key, value = (
        project(hidden.data, hidden.scale, hidden.zero, linear.weight, linear.bias, **norm)
        for linear in (projection.k_proj, projection.v_proj)
    )
    return key.unflatten(-1, (-1, projection.head_dim)), value.unflatten(-1, (-1, projection.head_dim))


@dataclass(frozen=True)
class RotatedTensor:
    """Quantized keys that are rotated when they are dequantized: RoPE depends on where in a row a key stands.

    Args:
        keys: `[num_tokens, kv_heads, head_dim]`.
        positions: of each token in its context, int32 `[num_tokens]`.
        rotary: the rotary embedding.
    """

    keys: QuantizedTensor
    positions: Tensor
    rotary: nn.Module

    @property
    def shape(self) -> torch.Size:
        """Shape of the dequantized keys."""
        return self.keys.shape

    @property
    def device(self) -> torch.device:
        """Device of the keys."""
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of keys, scales and positions."""
        return self.keys.nbytes + self.positions.nbytes

    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors."""
        return (*self.keys.tensors(), self.positions)

    def map(self, function) -> "RotatedTensor":
        """Apply `function` to every stored tensor."""
        return RotatedTensor(self.keys.map(function), function(self.positions), self.rotary)

    def __getitem__(self, tokens) -> "RotatedTensor":
        return RotatedTensor(self.keys[tokens], self.positions[tokens], self.rotary)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the rotated keys in `dtype`."""
        return _rotate(self.keys.dequantize(dtype), self.positions, self.rotary)


def _rotate(key: Tensor, positions: Tensor, rotary: nn.Module) -> Tensor:
    cos, sin = rotary(key, position_ids=positions.unsqueeze(0))
    return rotate(key, (cos[0], sin[0]))


def rotate_keys(key, positions: Tensor, rotary: nn.Module) -> "Tensor | RotatedTensor":
    """Rotate every key by its position; quantized keys when they are read."""
    positions = positions.to(key.device)
    return _rotate(key, positions, rotary) if isinstance(key, Tensor) else RotatedTensor(key, positions, rotary)


def row_positions(offsets: tuple[int, ...]) -> Tensor:
    """Position of every token in its context, int32 `[num_tokens]`."""
    spans = zip(offsets[:-1], offsets[1:], strict=True)
    return torch.cat([torch.arange(end - start, dtype=torch.int32) for start, end in spans])
