"""Times of calls, and the bandwidth and matrix rate that they are held against, measured on the same device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from triton.errors import TritonError

# what a call may fail with and leave the process as it was: memory, a compiler, a shape that it does not know
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, AssertionError, TritonError)
# bytes of inputs to go through before one is met again: more than any cache holds
BEYOND_CACHE = 512 * 2**20
# microseconds of work in one replay, and replays
WORK, REPLAYS = 4000, 15


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes a second of a large copy, 16-bit operations a second of a large product."""

    bandwidth: float
    operations: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """A copy of 2 GiB (read and written) and a product of 8192 x 8192; tiny on a CPU."""
    size, width = (2**31, 8192) if device.type == "cuda" else (2**12, 16)
    target, source = (torch.ones(size // 2, dtype=torch.bfloat16, device=device) for _ in range(2))
    copy = median_us([lambda: target.copy_(source)], device)
    left, right = (torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = median_us([lambda: left @ right], device)
    return Ceilings(2 * size / copy * 1e6, 2 * width**3 / product * 1e6)


def median_us(calls: list[Callable[[], object]], device: torch.device, graph: bool = True) -> float:
    """Median microseconds of a call, the calls in turns: each has inputs of its own, so that none sits in a cache.

    Args:
        graph: replay the calls as a CUDA graph, without the time that Python takes to launch them.
    """
    if device.type != "cuda":
        return median(_seconds(call) for call in calls) * 1e6
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = max(1, min(200, int(WORK / max(1.0, _elapsed(calls, 1)))))
    if not graph:
        return median(_elapsed(calls, rounds) for _ in range(REPLAYS)) / (rounds * len(calls))
    stream, captured = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(captured):
        for _ in range(rounds):
            for call in calls:
                call()
    return median(_elapsed([captured.replay], 1) for _ in range(REPLAYS)) / (rounds * len(calls))


def eager_us(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds of a call as Python makes it, many after one another."""
    count = 100 if device.type == "cuda" else 1
    if device.type != "cuda":
        return _seconds(call) * 1e6
    return median(_elapsed([call], count) for _ in range(3)) / count


def _elapsed(calls: list[Callable[[], object]], rounds: int) -> float:
    """Microseconds of all calls, `rounds` times, between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(rounds):
        for call in calls:
            call()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
