"""Lines and columns in JSON documents of any size, for error messages.

A parser says no more than that a block is broken, or that a record lies in it. So the document is parsed again, in
blocks up to that one, and byte by byte from there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import ijson

# small: the parser queues all values of a block
BLOCK = 1 << 14

OpenStream = Callable[[], AbstractContextManager[BinaryIO]]


class _Counter:
    """Target of a parser: counts the values at `prefix`."""

    def __init__(self, prefix: str | None = None):
        self.prefix, self.count = prefix, 0

    def send(self, event: tuple[Any, ...]) -> None:
        if event[0] == self.prefix and event[1] not in ("map_key", "end_map", "end_array"):
            self.count += 1


class _Position:
    """Line and column behind the bytes seen so far."""

    def __init__(self):
        self.line, self.column, self.blank = 1, 0, True

    def add(self, data: bytes) -> None:
        self.blank = self.blank and not data.strip()
        self.line += data.count(b"\n")
        self.column = len(data) - data.rfind(b"\n") - 1 if b"\n" in data else self.column + len(data)


def syntax_error_position(open_stream: OpenStream) -> tuple[int, int] | None:
    """Line and column (from 1) of the byte at which a document is no JSON any more; None when it holds nothing."""
    position = _stop(open_stream, None, 0)
    return None if position.blank else (position.line, max(position.column, 1))


def record_line(open_stream: OpenStream, prefix: str, number: int) -> int:
    """The line on which record `number` (from 1) at `prefix` starts."""
    return _stop(open_stream, prefix, number).line


def _stop(open_stream: OpenStream, prefix: str | None, number: int) -> _Position:
    """The position where the count at `prefix` reaches `number`, or where parsing fails."""
    blocks, position = _blocks_before(open_stream, prefix, number), _Position()
    counter = _Counter(prefix)
    parser = ijson.parse_coro(counter)
    with open_stream() as stream:
        for _ in range(blocks):
            block = stream.read(BLOCK)
            position.add(block)
            parser.send(block)
        try:
            for byte in stream.read(BLOCK):
                position.add(bytes([byte]))
                parser.send(bytes([byte]))
                if number and counter.count >= number:
                    break
        except ijson.JSONError:
            pass
    return position


def _blocks_before(open_stream: OpenStream, prefix: str | None, number: int) -> int:
    """How many whole blocks come before the one where the count at `prefix` reaches `number`, or parsing fails."""
    counter, blocks = _Counter(prefix), 0
    parser = ijson.parse_coro(counter)
    try:
        with open_stream() as stream:
            while block := stream.read(BLOCK):
                parser.send(block)
                if number and counter.count >= number:
                    break
                blocks += 1
    except ijson.JSONError:
        pass
    return blocks
