"""Compile the kernels' variants for every chip, with no GPU, and write what the binaries say.

    python kernels/benchmarks/inspect_kernels.py --output results/kernels_inspect.json
    python kernels/benchmarks/inspect_kernels.py --dtypes fp16 fp32 --head-dims 16 80 192 256 --output /tmp/others.json
    python kernels/benchmarks/inspect_kernels.py --one-a-kernel --output /tmp/inspect.json

Fails when anything spills, does not fit into shared memory, has a 16-bit product without tensor cores in its loop, or
when decode asks for more than 1.05 times the bytes it must read. Run without TRITON_INTERPRET.
"""

import argparse
import hashlib
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import triton
from ahead_of_time import SHARED_LIMIT, TARGETS, inspect, source_of
from traffic import CHIPS, Shape, decode_traffic, forward_traffic
from variants import DTYPES, PARTIAL, WHOLE, Variant, all_variants, attention_tensors, one_variant_a_kernel
from xcllama_kernels.decode import plan_decode
from xcllama_kernels.forward import plan_forward
from xcllama_kernels.launch import INTERPRETED, Launch

from xcllama.provenance import require_clean, write_result

CACHE = Path.home() / ".cache" / "xcllama" / "kernels_inspect.jsonl"
# of the committed table: the precision and the heads of published models
TABLE_DTYPES, TABLE_HEAD_DIMS = ("bf16",), (64, 128)
WITHOUT_PRODUCTS = ("combine_kernel", "inverse_rms_kernel")


def problems(record: dict) -> list[str]:
    """The rules that a record breaks."""
    found = []
    if record["spill_bytes"]:
        found.append(f"spills {record['spill_bytes']} bytes")
    limit = SHARED_LIMIT[record["target"]]
    if record["shared_bytes"] > limit:
        found.append(f"needs {record['shared_bytes']} bytes of shared memory, the limit is {limit}")
    if record["dtype"] != "fp32" and record["kernel"] not in WITHOUT_PRODUCTS:
        kinds = record["tensor_core_instructions_in_loops"]
        if not kinds:
            found.append("has no tensor core instruction in its loop")
        # the rows of the product: query rows, or tokens where the tile holds tokens
        rows = record["config"]["block_n" if record["kernel"] == "context_gradient_kernel" else "block_m"]
        if record["target"] == "sm_90" and rows >= 64 and "wgmma" not in kinds:
            found.append(f"has {rows} rows a tile but no wgmma in its loop")
    if record["kernel"] == "decode_kernel" and record["bytes_requested"] > 1.05 * record["bytes_required"]:
        found.append(f"requests {record['bytes_requested']} bytes, {record['bytes_required']} are required")
    return found


def inspect_cached(launch: Launch, target: str, cache: Path) -> dict[str, object]:
    """What `inspect` says, from the lines of `cache` where the same code was compiled for the same chip before."""
    identity = [source_of(launch).hash(), target, launch.options(), triton.__version__]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    if cache.exists():
        for line in cache.read_text().splitlines():
            if line.startswith(key):
                return json.loads(line.partition(" ")[2])
    record = inspect(launch, target)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a") as file:
        file.write(f"{key} {json.dumps(record)}\n")
    return record


def describe(variant: Variant, target: str) -> dict[str, object]:
    """What is known of a variant without compiling it."""
    traffic = variant.traffic
    return {
        "kernel": variant.kernel, "target": target, "dtype": variant.dtype, "bits": variant.bits,
        "head_dim": variant.head_dim, "shape": variant.shape, "config": vars(variant.launch.config),
        "grid": list(variant.launch.grid), "bytes_required": traffic.required, "bytes_requested": traffic.requested,
        "operations": traffic.operations,
        "roofline_us": {chip: traffic.roofline_us(chip, variant.dtype != "fp32") for chip in CHIPS},
    }  # fmt: skip


def inspect_part(part: tuple[str, str], one_a_kernel: bool, head_dims: list[int], cache: Path) -> list[dict]:
    """The records of one chip and data type; what breaks a rule is printed at once."""
    target, dtype = part
    records = []
    for variant in (one_variant_a_kernel if one_a_kernel else all_variants)(TARGETS[target], dtype):
        if variant.head_dim is not None and variant.head_dim not in head_dims:
            continue
        records.append(describe(variant, target) | inspect_cached(variant.launch, target, cache))
        if found := problems(records[-1]):
            print(*(records[-1][name] for name in ("target", "kernel", "dtype", "bits", "head_dim")), end=" ")
            print(list(records[-1]["config"].values()), "; ".join(found), flush=True)
    return records


def rooflines() -> list[dict[str, object]]:
    """Least time of decode (one new token) and prefill (512) for each batch, context and number of heads."""
    table = []
    for heads in ((32, 32), (32, 8), (9, 3)):
        head_dim = 64 if heads == (9, 3) else 128
        for batch in (1, 8, 64):
            for context_len in (1024, 8192, 65536):
                for bits in (0, 8, 4):
                    row = {"batch": batch, "context": context_len, "heads": heads, "head_dim": head_dim, "bits": bits}
                    for kind, query_len in (("decode", 1), ("forward", 512)):
                        shape = Shape(batch, batch, context_len, query_len, *heads, head_dim)
                        tensors = attention_tensors(shape, DTYPES["bf16"], bits)
                        plan = plan_decode if kind == "decode" else plan_forward
                        launches = plan(**tensors, target=TARGETS["sm_90"])
                        decode = kind == "decode"
                        traffic = decode_traffic(launches, shape) if decode else forward_traffic(launches[0], shape)
                        row[f"{kind}_us"] = {chip: traffic.roofline_us(chip, True) for chip in CHIPS}
                    table.append(row)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=list(TABLE_DTYPES), choices=list(DTYPES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(TABLE_HEAD_DIMS), choices=WHOLE + PARTIAL)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help=f"records of the same code, not compiled again ({CACHE})"
    )
    parser.add_argument("--one-a-kernel", action="store_true", help="the default configuration in bf16 only")
    arguments = parser.parse_args()
    if INTERPRETED:
        raise ValueError("nothing is compiled under TRITON_INTERPRET=1; unset it.")
    require_clean(arguments.output)
    start = time.monotonic()
    one = arguments.one_a_kernel
    parts = [(target, dtype) for dtype in (["bf16"] if one else arguments.dtypes) for target in arguments.targets]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        run_part = partial(inspect_part, one_a_kernel=one, head_dims=arguments.head_dims, cache=arguments.cache)
        records = [record for part in pool.map(run_part, parts) for record in part]
    broken = sum(bool(problems(record)) for record in records)
    run = {"seconds": round(time.monotonic() - start, 1), "num_kernels": len(records), "broken": broken}
    write_result(arguments.output, run | {"kernels": records, "rooflines": rooflines()}, ["kernels"])
    print(f"{len(records)} variants compiled, {broken} break a rule; wrote {arguments.output}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
