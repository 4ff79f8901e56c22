"""The file of a context cache: written atomically, checked on the way in, mapped and never unpickled.

One safetensors file holds the states ("hidden", or "key" and "value"; a quantized state adds "<name>.scale" and
"<name>.zero"), "offsets", "token_ids", "rows" and "row_offsets" (documents of each row, back to back), and a header
with format, version, layout, dtype, fingerprint and checksum. Nothing in it is trusted: whatever does not fit is a
ValueError.
"""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .atomic_file import save_tensors
from .quantized_tensor import QuantizedTensor

FORMAT = "xcllama-context-cache"
# 2: outliers beside the scales of quantized states
FORMAT_VERSION = 2
FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED_BITS = {"int8": 8, "int4": 4}
LAYOUTS = {"hidden": ("hidden",), "condensed": ("key", "value")}
# reads of a file that is replaced again and again
MAX_READS = 100
HEADER_FIELDS = ("format_version", "layout", "dtype", "fingerprint")


def write_file(path: Path, header: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Write `tensors` under `header` and its checksum: readers see the old file or the new one, never a part."""
    save_tensors(path, tensors, header | {"checksum": checksum(header, tensors)})


def read_file(path: Path, verify: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and mapped tensors of a file.

    Raises:
        ValueError: no context cache, of a newer format, truncated or altered, or replaced during every read.
        FileNotFoundError: no such file.
    """
    # header and tensors are opened one after the other: a file that is replaced in between is read again
    for _ in range(MAX_READS):
        before = _identity(path)
        try:
            header, tensors = _read_once(path, verify)
        except ValueError:
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return header, tensors
    raise ValueError(
        f"{path} was replaced during each of {MAX_READS} reads; load it when its writer is done, or from a copy."
    )


def _identity(path: Path) -> tuple[int, int, int]:
    if not path.is_file():
        raise FileNotFoundError(f"no context cache at {path}.")
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_once(path: Path, verify: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_header(header, path)
            _check_extents(file, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    # torch and safetensors each have errors of their own for sizes, dtypes and names that cannot be
    except (SafetensorError, RuntimeError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path} is truncated, or no safetensors file ({error}); encode the contexts again."
        ) from error
    stated = header.get("checksum")
    if verify and checksum({key: value for key, value in header.items() if key != "checksum"}, tensors) != stated:
        raise ValueError(f"{path} was altered: its checksum does not match; encode the contexts again.")
    return header, tensors


def checksum(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_header(header: dict[str, str], path: Path) -> None:
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no context cache: its header has format {header.get('format')!r}, not {FORMAT!r}."
        )
    if missing := [field for field in HEADER_FIELDS if field not in header]:
        raise ValueError(f"{path} has no {', '.join(missing)} in its header; encode the contexts again.")
    version = header["format_version"]
    if not (version.isascii() and version.isdecimal() and len(version) < 9):
        raise ValueError(f"{path} has no readable format version: {version!r:.40}.")
    if int(version) < 1:
        raise ValueError(f"{path} has format version {version}, the first is 1; encode the contexts again.")
    if int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this code reads up to {FORMAT_VERSION}; update the model's code."
        )
    if header["layout"] not in LAYOUTS or header["dtype"] not in (*FLOAT_DTYPES, *QUANTIZED_BITS):
        raise ValueError(f"{path} has unknown layout {header['layout']!r:.40} or dtype {header['dtype']!r:.40}.")


def _check_extents(file, path: Path) -> None:
    """Refuse shapes that torch cannot hold: an empty tensor may declare any size."""
    for name in file.keys():
        if any(size >= 2**48 for size in file.get_slice(name).get_shape()):
            raise ValueError(f"`{name}` in {path} declares a size of 2**48 or more; encode the contexts again.")


def _state(name: str, dtype: str, tensors: dict[str, Tensor]) -> "Tensor | QuantizedTensor":
    """One state of the file as its header says; whether its parts fit is for `ContextCache` to check."""
    data = tensors[name]
    stored = FLOAT_DTYPES.get(dtype) or {"int8": torch.int8, "int4": torch.uint8}[dtype]
    if data.dtype != stored:
        raise ValueError(f"`{name}` is {data.dtype}, the header says {dtype}.")
    if dtype in FLOAT_DTYPES:
        return data
    return QuantizedTensor(data, tensors[f"{name}.scale"], tensors[f"{name}.zero"] if dtype == "int4" else None)


def assemble(header: dict[str, str], tensors: dict[str, Tensor]) -> tuple[dict, tuple[int, ...], tuple]:
    """States, offsets and rows of a file, trusting nothing about dtypes and shapes.

    Raises:
        ValueError, KeyError: tensors that are wrong or missing.
    """
    states = {name: _state(name, header["dtype"], tensors) for name in LAYOUTS[header["layout"]]}
    for name in ("offsets", "rows", "row_offsets", "token_ids"):
        if tensors[name].dim() != 1 or tensors[name].dtype not in (torch.int32, torch.int64):
            raise ValueError(f"`{name}` must be a list of integers")
    flat, bounds = tensors["rows"].tolist(), tensors["row_offsets"].tolist()
    if bounds[:1] != [0] or bounds[-1] != len(flat) or bounds != sorted(bounds):
        raise ValueError("`row_offsets` does not fit `rows`")
    rows = tuple(tuple(flat[start:end]) for start, end in pairwise(bounds))
    return states, tuple(tensors["offsets"].tolist()), rows
