"""Files that are there as a whole or not at all, whenever their writer is killed; safetensors among them.

On Linux a file is written without a name, so what a killed writer leaves is freed with it. Elsewhere, and where the
file system cannot do that, it has a locked name beside its target, and whoever writes that target next sweeps it away.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:
    # Windows refuses to remove what another process has open, which is lock enough
    fcntl = None

# younger files may belong to a writer that has not locked its file yet
SWEEP_SECONDS = 10
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end of the block, all of it on disk, if nothing raises."""
    sweep(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    unnamed = _open_unnamed(path.parent)
    file = os.fdopen(unnamed, "wb") if unnamed is not None else open(partial, "xb")
    try:
        with file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if unnamed is not None:
                _name(unnamed, partial)
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what killed writers of `path` left beside it."""
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        try:
            if time.time() - partial.stat().st_mtime < SWEEP_SECONDS:
                continue
            with open(partial, "rb") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError, PermissionError):
            # its writer lives, or another process was quicker
            continue


def _open_unnamed(folder: Path) -> int | None:
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except FileNotFoundError:
        raise
    except OSError:
        # this file system has no files without a name
        return None


def _name(descriptor: int, path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # with a folder's descriptor `link` follows the link in /proc to the file itself
        os.link(f"/proc/self/fd/{descriptor}", path.name, dst_dir_fd=folder)
    finally:
        os.close(folder)


def _sync_folder(folder: Path) -> None:
    if fcntl is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, straight from the tensors' memory.

    Args:
        path: the file; an old one is replaced.
        tensors: any dtype that safetensors knows, on any device.
        metadata: strings for its header.
    """
    # wide elements first, so that every tensor starts at a multiple of its element
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = SAFETENSORS_DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    described = json.dumps(header, separators=(",", ":")).encode()
    described += b" " * (-len(described) % 8)
    with replaced_file(path) as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for name in names:
            values = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(values.view(torch.uint8).numpy())
