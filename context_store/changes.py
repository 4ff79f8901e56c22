"""A token in shared memory that every commit renews: readers see without a query that nothing has changed."""

import mmap
import os
import secrets
from pathlib import Path

NAME = "catalogue.changes"


class Changes:
    """Eight bytes of a file beside the catalogue, mapped by all who have the store open.

    `renew` follows a commit, so a reader that finds the token it saw before its last look at the catalogue has missed
    none; a writer that dies in between leaves a commit that nobody was told of.

    Args:
        folder: of the namespace.
        read_only: map what is there; where there is nothing, `token` is None.
    """

    def __init__(self, folder: Path, read_only: bool):
        self._words = None
        path = folder / NAME
        if read_only and not path.is_file():
            return
        descriptor = os.open(path, os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not read_only and os.fstat(descriptor).st_size < 8:
                # written, not truncated: a hole in a mapped file kills the process when the disk is full
                os.pwrite(descriptor, bytes(8), 0)
            if os.fstat(descriptor).st_size >= 8:
                access = mmap.ACCESS_READ if read_only else mmap.ACCESS_WRITE
                self._words = memoryview(mmap.mmap(descriptor, 8, access=access)).cast("Q")
        finally:
            os.close(descriptor)

    @property
    def token(self) -> int | None:
        """What the last commit wrote."""
        return None if self._words is None else self._words[0]

    def renew(self) -> None:
        """Tell all readers to look: a token that was never there before, as two writers may be here at once."""
        self._words[0] = secrets.randbits(64)
