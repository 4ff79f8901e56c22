"""An ordered map over worker processes: results do not depend on their number, nor memory on the input's size."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def blocks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`items` in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_proc: int,
    initializer: Callable[..., None],
    initargs: tuple[Any, ...],
) -> Iterator[Result]:
    """`function` of each item, in order, computed by `num_proc` processes, at most two items ahead for each."""
    context = _context()
    with ProcessPoolExecutor(num_proc, context, initializer, initargs) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _context() -> multiprocessing.context.BaseContext:
    """Processes that are not forked from this one, which may have threads (fsspec has), but from a clean one."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # imported once, not once a worker
    context.set_forkserver_preload(["dataset_builders.reading"])
    return context


def check_num_proc(num_proc: int) -> int:
    """Return `num_proc` when it is at least 1."""
    if num_proc < 1:
        raise ValueError(f"`num_proc` must be at least 1, got {num_proc}.")
    return num_proc
