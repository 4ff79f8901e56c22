"""Files that appear whole, on disk, or not at all; locks between processes."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def durable(path: Path) -> Iterator[FileIO]:
    """A file to write that replaces `path` when the block ends: readers see the old file or the new one.

    A process that is killed leaves `.NAME.XXXXXXXX.partial` beside it.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file in one move."""
    with durable(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON in one move."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_picture(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib as PNG in one move, and close it."""
    from matplotlib import pyplot

    with durable(path) as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)


@contextmanager
def locked(path: Path, operation: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Hold the lock of a folder, or of a file that is made if needed.

    Yields:
        Whether it was got: False only where `operation` has `LOCK_NB`, and another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, operation)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
