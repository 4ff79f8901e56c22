"""Count the bytes that the loads and stores of a launch really request, in Triton's interpreter.

Needs TRITON_INTERPRET=1 when triton is imported. An address counts once an instruction, as a coalesced access does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from triton.runtime import interpreter


@dataclass
class Requested:
    """Bytes requested so far."""

    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


def _unique_bytes(pointers, mask) -> int:
    addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    return np.unique(addresses).size * max(1, pointers.get_element_ty().primitive_bitwidth // 8)


@contextmanager
def counted_traffic() -> Iterator[Requested]:
    """Within the context, add up what interpreted kernels load and store."""
    requested = Requested()
    builder = interpreter.InterpreterBuilder
    # the unmasked forms call these
    load, store = builder.create_masked_load, builder.create_masked_store

    # how many arguments follow the mask differs between versions of triton
    def masked_load(self, ptrs, mask, *rest):
        requested.loaded += _unique_bytes(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def masked_store(self, ptrs, value, mask, *rest):
        requested.stored += _unique_bytes(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    try:
        yield requested
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
