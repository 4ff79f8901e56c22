"""Progress of long commands: a bar on a terminal, elsewhere a line every ten seconds, from the first second on."""

import sys
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_PER_LINE = 10.0


class Progress:
    """Shows what share of a job is done, and a line about it.

    Args:
        file: where to; None: the error output.
    """

    def __init__(self, file: TextIO | None = None):
        self._file = file or sys.stderr
        self._bar = None
        if self._file.isatty():
            self._bar = tqdm(
                total=1.0, bar_format="{percentage:3.0f}% |{bar:20}| {desc}", file=self._file, leave=False
            )
        self._next = monotonic()

    def show(self, share: float, line: str) -> None:
        """Say that `share` (0 to 1) is done; `line` is the rest."""
        if self._bar is not None:
            self._bar.n = share
            self._bar.set_description_str(line)
        elif monotonic() >= self._next:
            print(f"{share:4.0%}  {line}", file=self._file, flush=True)
            self._next = monotonic() + SECONDS_PER_LINE

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Seconds as a person says them: "40 s", "3 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def tracked(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one after the other, with progress from the first on: how many are done, and the time left.

    Args:
        what: is done with them, as "least squares".
    """
    progress, begin = Progress(), monotonic()
    try:
        for done, item in enumerate(items):
            left = f", about {duration((monotonic() - begin) * (len(items) - done) / done)} left" if done else ""
            progress.show(done / len(items), f"{what}: {done} of {len(items)}{left}")
            yield item
    finally:
        progress.close()
