"""Time the kernels on a GPU beside SDPA, flex_attention and FlashAttention's varlen form (where installed).

    python kernels/benchmarks/benchmark.py --output results/gpu_kernels.json [--seconds 600]
    python kernels/benchmarks/benchmark.py --tune --output runs/tuned.json      # every candidate configuration
    TRITON_INTERPRET=1 python kernels/benchmarks/benchmark.py --dry-run --output runs/dry.json

Times stand beside what the device reaches: bytes over the bandwidth of a large copy, operations over the rate of a
large product. Some rows of each result are first compared with the float32 reference. What cannot run stands in the
results with its error, what there was no time for by name. Fails when one of our kernels cannot run or is wrong.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from cases import (
    Attend,
    Projection,
    Work,
    all_cases,
    competitors,
    expected_rows,
    make_inputs,
    ours,
    projection_calls,
    projection_inputs,
    required,
)
from timing import FAILURES, Ceilings, eager_us, measure_ceilings, median_us
from torch import Tensor
from torch.nn.functional import linear
from tuning import tune
from xcllama_kernels.cases import relative_error
from xcllama_kernels.launch import INTERPRETED
from xcllama_kernels.reference import dequantize

from xcllama.provenance import require_clean, write_result

# relative error in 16 bits; outliers of quantized keys make scores large, and their rounding with them
TOLERANCE, QUANTIZED_TOLERANCE = 1e-2, 2e-2
# tokens of a context that the targets of int8 and int4 are for
LONG = 65536


class NoRoom(RuntimeError):
    """The inputs of a case do not fit into the device's memory."""


def time_attention(work: Work, device: torch.device, ceilings: Ceilings) -> dict[str, object]:
    """Ours, and the others on 16-bit inputs."""
    moved, operations = required(work)
    if device.type == "cuda" and 4 * moved > torch.cuda.mem_get_info()[0]:
        raise NoRoom(f"needs {4 * moved / 2**30:.0f} GiB of the device's memory")
    cases = make_inputs(work, device)
    rows = sorted({0, work.shape.batch - 1})
    expected = expected_rows(cases[0], rows)
    record: dict[str, object] = {"bytes": moved, "operations": operations}
    for name, attend in ({"ours": ours(cases)} | ({} if work.bits else competitors(cases, work))).items():
        found = time_copies(attend, len(cases), rows, expected, work.kind == "training", device)
        if "us" in found:
            rate = 1e6 / found["us"]
            found |= {
                "of_copy": moved * rate / ceilings.bandwidth,
                "of_product": operations * rate / ceilings.operations,
            }
        record[name] = found
    return record


def time_copies(
    attend: Attend, copies: int, rows: list[int], expected: Tensor, training: bool, device: torch.device
) -> dict[str, object]:
    """Error of some rows, and median times with and without what Python takes; or why it failed."""
    try:
        made = [attend(number) for number in range(copies)]
        function, inputs = made[0]
        error = relative_error(function(*inputs)[rows], expected)
        runs = [_run(function, inputs, training) for function, inputs in made]
        us = median_us(runs, device, graph=not training)
        return {"error": error, "us": round(us, 3), "eager_us": round(eager_us(runs[0], device), 3)}
    except FAILURES as failure:
        return {"failed": reason(failure)}


def reason(failure: Exception) -> str:
    """The kind of a failure and its first line."""
    return f"{type(failure).__name__}: {str(failure).splitlines()[:1]}"


def _run(function: Callable[..., Tensor], inputs: list[Tensor], training: bool) -> Callable[[], object]:
    leaves = [tensor.detach().requires_grad_(training) for tensor in inputs]
    if not training:
        return lambda: function(*leaves)

    def both() -> object:
        output = function(*leaves)
        return torch.autograd.grad(output, leaves, torch.ones_like(output))

    return both


def time_projection(work: Projection, device: torch.device) -> dict[str, object]:
    """Projection of quantized states against dequantizing first."""
    inputs = projection_inputs(work, device)
    data, scale, zero, weight = inputs
    expected = linear(dequantize(data, scale, zero, torch.float32).flatten(1), weight.float())
    record: dict[str, object] = {}
    for name, call in projection_calls(inputs).items():
        try:
            record[name] = {"error": relative_error(call(), expected), "us": round(median_us([call], device), 3)}
        except FAILURES as failure:
            record[name] = {"failed": reason(failure)}
    return record


def records_of(work: Work | Projection, tuning: bool, device: torch.device, ceilings: Ceilings) -> Iterator[dict]:
    """The records of a case."""
    try:
        if tuning:
            yield from (asdict(work) | record for record in tune(work, device))
        elif isinstance(work, Projection):
            yield asdict(work) | time_projection(work, device)
        else:
            yield asdict(work) | time_attention(work, device, ceilings)
    except (NoRoom, torch.OutOfMemoryError) as failure:
        yield asdict(work) | {"left_out": str(failure).splitlines()[0]}
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_wrong(record: dict) -> bool:
    """Whether one of our kernels failed or missed the reference."""
    result = record.get("ours", record)
    tolerance = QUANTIZED_TOLERANCE if record.get("bits") else TOLERANCE
    return "left_out" not in record and ("failed" in result or not result.get("error", 0.0) < tolerance)


def targets(records: list[dict]) -> list[dict[str, object]]:
    """What was aimed at on Hopper, and the worst that was measured; None: not measured."""
    measured = [record for record in records if "us" in record.get("ours", {})]
    plain = [record for record in measured if not record["bits"]]
    decode = [record for record in plain if record["kind"] == "decode" and record["shape"]["context_len"] >= 8192]
    wide = [record for record in plain if record["kind"] == "prefill" and record["shape"]["head_dim"] == 128]
    shared = [record for record in plain if record["kind"] == "decode, shared context" and "us" in record["sdpa"]]
    found = {
        "decode, contexts of 8k tokens and more: share of a copy's bandwidth": (
            0.85, [record["ours"]["of_copy"] for record in decode],
        ),
        "prefill, head size 128: share of a product's rate": (0.6, [record["ours"]["of_product"] for record in wide]),
        "64 rows on one context: times faster than SDPA": (
            10, [record["sdpa"]["us"] / record["ours"]["us"] for record in shared],
        ),
        "decode, 64k tokens, int8: times faster than 16 bit": (1.7, _ratios(measured, 8)),
        "decode, 64k tokens, int4: times faster than 16 bit": (2.8, _ratios(measured, 4)),
    }  # fmt: skip
    return [
        {"target": name, "at_least": least, "measured": min(values, default=None)}
        for name, (least, values) in found.items()
    ]


def _ratios(records: list[dict], bits: int) -> list[float]:
    """How much faster decoding is on quantized contexts than on the same ones in 16 bits."""
    times = {
        (str(record["shape"]), record["bits"]): record["ours"]["us"]
        for record in records
        if record["kind"] == "decode" and record["shape"]["context_len"] == LONG
    }
    return [times[shape, 0] / us for (shape, found), us in times.items() if found == bits and (shape, 0) in times]


def compile_kernels(work: Work | Projection) -> None:
    """Run a case on few tokens: what it compiles is on disk then, for every process."""
    device = torch.device("cuda")
    if isinstance(work, Projection):
        next(iter(projection_calls(projection_inputs(replace(work, num_tokens=256), device)).values()))()
        return
    for length in (1024, 8192) if work.shape.batch <= 8 else (1024,):
        short = replace(work, shape=replace(work.shape, context_len=min(length, work.shape.context_len)))
        function, inputs = ours(make_inputs(short, device)[:1])(0)
        _run(function, inputs, work.kind == "training")()


def compile_all(works: list[Work | Projection], seconds: float) -> None:
    """Compile on many cores for `seconds` at most; what fails here fails again, and is told, where it is timed."""
    cores = max(1, min(8, (os.cpu_count() or 2) // 2))
    # leaving the block ends the processes
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map_async(compile_kernels, works, chunksize=1).wait(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no case starts after them")
    parser.add_argument("--tune", action="store_true", help="time every candidate configuration instead")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    if arguments.dry_run != INTERPRETED or not (INTERPRETED or torch.cuda.is_available()):
        raise ValueError("the benchmark needs a GPU and no TRITON_INTERPRET, or --dry-run and TRITON_INTERPRET=1.")
    require_clean(arguments.output)
    deadline = time.monotonic() + arguments.seconds
    device, works = torch.device("cpu" if INTERPRETED else "cuda"), all_cases(arguments.dry_run)
    if not arguments.dry_run:
        compile_all(works, arguments.seconds / 2)
    ceilings = measure_ceilings(device)
    records, left_out = [], []
    for work in works:
        if time.monotonic() > deadline:
            left_out.append(asdict(work))
            continue
        for record in records_of(work, arguments.tune, device, ceilings):
            print(record, flush=True)
            records.append(record)
        # what was measured is kept when a later case is cut off
        figures = {"ceilings": asdict(ceilings), "targets": targets(records), "records": records, "left_out": left_out}
        write_result(arguments.output, figures, ["kernels"], seed=0)
    wrong = sum(map(is_wrong, records))
    print(f"{len(records)} records, {wrong} of our results failed or are wrong; wrote {arguments.output}")
    return 1 if wrong or not records else 0


if __name__ == "__main__":
    sys.exit(main())
