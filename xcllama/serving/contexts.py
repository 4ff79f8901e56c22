"""Keys and values of the contexts that requests read, kept in memory under a bound: least recently used first out."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modeling_xcllama.context_cache import ProjectedContext
from modeling_xcllama.cross_attention import ContextRows
from modeling_xcllama.quantized_tensor import map_state


@dataclass
class _Place:
    """Where a context lies, the tokens of its longest document, and how many rows are reading it."""

    start: int
    tokens: int
    longest: int
    readers: int = 0


class ResidentContexts:
    """Contexts back to back in tensors of a fixed number of tokens, which rows of any step read where they lie.

    Args:
        max_bytes: of keys and values; memory is taken as contexts come.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.max_tokens, self.evictions = max_bytes, None, 0
        self._places: OrderedDict[Hashable, _Place] = OrderedDict()
        self._room: ProjectedContext | None = None

    def __contains__(self, name: Hashable) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def tokens(self) -> int:
        """Tokens of the contexts that are resident."""
        return sum(place.tokens for place in self._places.values())

    def add(self, name: Hashable, tokens: int, project: Callable[[], ProjectedContext]) -> bool:
        """Copy in what `project` gives: keys and values of one row, of `tokens` tokens, at least one.

        Returns:
            Whether there was room: False as long as other rows read too much; nothing is projected then.

        Raises:
            ValueError: a context that does not fit at all, or cannot be projected.
        """
        context = None
        if self._room is None:
            context = project()
            self._make_room(context, tokens)
        if tokens > self.max_tokens:
            raise ValueError(f"a context of {tokens} tokens; {self.max_tokens} fit into {self.max_bytes:,} bytes.")
        while (start := self._gap(tokens)) is None:
            unread = next((other for other, place in self._places.items() if not place.readers), None)
            if unread is None:
                return False
            del self._places[unread]
            self.evictions += 1
        context = context or project()
        parts = (*context.keys, *context.values)
        for whole, part in zip((*self._room.keys, *self._room.values), parts, strict=True):
            for target, source in zip(_tensors(whole), _tensors(part), strict=True):
                target[start : start + tokens] = source
        self._places[name] = _Place(start, tokens, context.rows.longest[0])
        return True

    def take(self, name: Hashable) -> None:
        """Keep a resident context for one more row."""
        self._places[name].readers += 1
        self._places.move_to_end(name)

    def release(self, name: Hashable) -> None:
        """One row less reads a context; it stays until its room is needed."""
        self._places[name].readers -= 1

    def rows(self, names: Sequence[Hashable | None]) -> ProjectedContext | None:
        """What rows read that read the contexts `names` (None: nothing); None if none of them reads anything."""
        places = {name: self._places[name] for name in names if name is not None}
        if not places:
            return None
        # a span of no tokens first; what lies between contexts is a span that no row reads
        offsets, longest, index = [0, 0], [0], {None: 0}
        for name, place in sorted(places.items(), key=lambda item: item[1].start):
            offsets += [place.start, place.start + place.tokens]
            longest += [0, place.longest]
            index[name] = len(longest) - 1
        chosen = tuple(index[name] for name in names)
        rows = ContextRows((*offsets, self.max_tokens), chosen, (*longest, 0))
        return replace(self._room, rows=rows)

    def _gap(self, tokens: int) -> int | None:
        """The first place with room for so many tokens."""
        end = 0
        for place in sorted(self._places.values(), key=lambda place: place.start):
            if place.start - end >= tokens:
                return end
            end = max(end, place.start + place.tokens)
        return end if self.max_tokens - end >= tokens else None

    def _make_room(self, context: ProjectedContext, tokens: int) -> None:
        """Tensors like those of a first context, of as many tokens as the bound allows."""
        self.max_tokens = self.max_bytes * tokens // context.nbytes

        def make(tensor: Tensor) -> Tensor:
            # laid out as the projection gives it, which is how attention reads it fastest
            order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
            shape = (self.max_tokens, *tensor.shape[1:])
            return torch.empty_permuted(shape, order, dtype=tensor.dtype, device=tensor.device)

        keys = tuple(map_state(state, make) for state in context.keys)
        values = tuple(map_state(state, make) for state in context.values)
        self._room = replace(context, keys=keys, values=values, cache=None)


def bytes_per_token(model) -> int:
    """Of keys and values of a context token, where they are not quantized."""
    config, projections = model.config, model.model.context_projections
    width = config.cross_attention_num_key_value_heads * config.cross_attention_head_dim
    return 2 * width * model.dtype.itemsize * len(projections)


def _tensors(state) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state.tensors()
