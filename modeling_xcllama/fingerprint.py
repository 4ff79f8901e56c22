"""What a context state depends on, as a digest of content: nothing that can be edited beside the weights is believed.

`weights_digest` reads every tensor once, at the speed of memory: its bits, taken as integers, are summed in columns of
a prime width, and the few sums are hashed. A tensor is read in the narrowest of bfloat16, float16 and its own dtype
that holds it exactly, so a checkpoint has one digest in whatever wider dtype it is loaded.

`KeptDigest` keeps that digest until something changes: the tensors' identity and versions, or a sample of their bits,
which also sees what goes behind torch's counters (fused optimizers, `.data`, adapters that are merged).
"""

import copy
import hashlib
import importlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# int64 sums a tensor: prime, so that no two rows of a weight fall on the same columns
COLUMNS = 4093
# rows of columns summed at a time: what stays in a CPU's cache
CHUNK_ROWS = {"cpu": 64}
# elements of a tensor, and bytes of all weights, up to which everything is sampled
SMALL_TENSOR, SMALL_MODEL_BYTES = 2**16, 2**24


def weights_digest(tensors: Iterable[tuple[str, Tensor]], fields: dict | None = None, sampled: bool = False) -> str:
    """SHA-256 over names, shapes and sums of the bits: the same on every device and in every wider dtype.

    Args:
        tensors: names and weights; those of quantized tensor subclasses are read as they are stored.
        fields: what else belongs to the digest, as JSON.
        sampled: read one element a row of large matrices, wandering over the columns, instead of all: what tells two
            checkpoints apart at a hundredth of the cost.

    Raises:
        ValueError: a tensor on the meta device, which holds nothing.
    """
    digest = hashlib.sha256(json.dumps(fields or {}, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        for part in _stored_parts(name, as_loaded(tensor)):
            dtype, sums = _canonical_sums(sampled_part(part) if sampled else part)
            digest.update(str(dtype).encode())
            digest.update(sums.cpu().numpy())
    return digest.hexdigest()


def as_loaded(tensor: Tensor) -> Tensor:
    """`tensor`, or what it was before bitsandbytes packed it for this CPU at its first use."""
    state = getattr(tensor, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return tensor.detach()
    library = importlib.import_module("bitsandbytes.functional")
    return library._convert_weight_packed_for_cpu_inverse(tensor.detach(), copy.deepcopy(state))[0]


def _stored_parts(name: str, tensor: Tensor) -> list[Tensor]:
    """The plain tensors in a tensor subclass, as torchao's quantized weights are; else the tensor itself."""
    if tensor.is_meta:
        raise ValueError(f"`{name}` is on the meta device and holds nothing: load the weights first.")
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for inner in names for part in _stored_parts(name, getattr(tensor, inner))]


def sampled_part(tensor: Tensor) -> Tensor:
    """`tensor`, or one element a row where that is large."""
    if tensor.numel() <= SMALL_TENSOR or tensor.dim() < 2:
        return tensor
    return tensor.reshape(-1)[:: tensor.shape[-1] + 1]


def _canonical_sums(tensor: Tensor) -> tuple[torch.dtype, Tensor]:
    narrower = [torch.bfloat16, torch.float16] if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else []
    for dtype in narrower:
        if (sums := _bit_sums(tensor, dtype)) is not None:
            return dtype, sums
    return tensor.dtype, _bit_sums(tensor, tensor.dtype)


def _bit_sums(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """int64 sums, at most `COLUMNS`, of the bits of `tensor` in `dtype`; None where that does not hold it exactly."""
    flat = tensor.reshape(-1)
    width = COLUMNS * 8 // dtype.itemsize
    total = torch.zeros(COLUMNS, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(width * CHUNK_ROWS.get(flat.device.type, 4096)):
        bits = chunk.to(dtype).contiguous()
        if dtype != flat.dtype and not torch.equal(bits.to(flat.dtype), chunk):
            return None
        whole = bits.numel() - bits.numel() % width
        if whole:
            total += bits[:whole].view(torch.int64).view(-1, COLUMNS).sum(0)
        if rest := bits.numel() - whole:
            padded = bits.new_zeros(-(-rest * dtype.itemsize // 8) * 8 // dtype.itemsize)
            padded[:rest] = bits[whole:]
            total[: len(padded) * dtype.itemsize // 8] += padded.view(torch.int64)
    return total[: -(-flat.numel() * dtype.itemsize // 8)]


class KeptDigest:
    """`weights_digest` of tensors that are mostly the same as at the last call."""

    def __init__(self) -> None:
        self._kept: tuple[tuple, str] = ((), "")

    def of(self, tensors: dict[str, Tensor], fields: dict) -> str:
        """The digest of `tensors` and `fields`, computed anew where they, or what is sampled of them, changed."""
        described = json.dumps(fields, sort_keys=True, default=str)
        seen = (described, bits_sample(tensors), *map(_identity, tensors.items()))
        # taken and replaced as one: other threads ask, too
        before, digest = self._kept
        if seen != before:
            digest = weights_digest(tensors.items(), fields)
            self._kept = seen, digest
        return digest


def _identity(item: tuple[str, Tensor]) -> tuple:
    name, tensor = item
    version = -1 if tensor.is_inference() else tensor._version
    # quantized weights may be packed anew at their first use
    place = tensor.data_ptr() if type(tensor) is nn.Parameter and tensor.is_floating_point() else None
    return name, tensor.dtype, tuple(tensor.shape), tensor.device, version, place


def bits_sample(tensors: dict[str, Tensor]) -> bytes:
    """Sums over the bits of all weights where they are few, else over some elements of each."""
    parts = [part for name, tensor in tensors.items() for part in _stored_parts(name, tensor.detach())]
    whole = sum(part.nbytes for part in parts) <= SMALL_MODEL_BYTES
    picked: dict[tuple, list[Tensor]] = {}
    for part in parts:
        picked.setdefault((part.device, part.dtype), []).append((part if whole else sampled_part(part)).reshape(-1))
    sums = [_bit_sums(torch.cat(pieces), dtype) for (_, dtype), pieces in picked.items()]
    return b"".join(part.cpu().numpy().tobytes() for part in sums)
