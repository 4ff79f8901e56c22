"""Coverage-guided fuzzing of context cache files with atheris: `make fuzz`, or

    python scripts/fuzz_context_cache.py --seconds 600 --output results/fuzz_context_cache.json

A file is refused with a ValueError or read into a cache that hangs together; anything else, or a process of more
than MEMORY_LIMIT_MIB (most of it torch and transformers) for files of a few KiB, is a finding: it ends the run with an
error and leaves the input in the working folder.
"""

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from random import Random

MEMORY_LIMIT_MIB = 1536
MEASURED = ("modeling_xcllama", "scripts/fuzz_context_cache.py")
NUMBERS = (0, 1, 2, 3, 4, 8, 9, 2**31, 2**48, 2**63 - 1, 2**63, -1)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "U64")
WORDS = ("hidden", "condensed", "float32", "bfloat16", "int8", "int4", "1", "2", "")


def write_seeds(folder: Path) -> int:
    """Valid files of every layout and dtype, the corpus to start from; returns how many."""
    import torch

    from modeling_xcllama import ContextCache

    shapes = {"hidden": {"hidden": (3, 8)}, "condensed": {"key": (3, 2, 4), "value": (3, 2, 4)}}
    for layout, tensors in shapes.items():
        states = {name: torch.randn(shape) for name, shape in tensors.items()}
        cache = ContextCache(states, (0, 1, 3), torch.arange(3, dtype=torch.int32), "f").join([[0, 1], [1], []])
        for dtype in ("float32", "bfloat16", "float16", "int8", "int4"):
            made = cache.quantize(dtype) if dtype.startswith("int") else cache.to(dtype=getattr(torch, dtype))
            made.save(folder / f"{layout}-{dtype}")
    return len(list(folder.iterdir()))


def read_back(path: Path, verify: bool) -> bool:
    """Load a file and use all of it; False where it is refused."""
    from modeling_xcllama import ContextCache

    try:
        cache = ContextCache.load(path, verify=verify)
    except ValueError:
        return False
    if cache.nbytes > path.stat().st_size:
        raise RuntimeError(f"a cache of {cache.nbytes} bytes in a file of {path.stat().st_size}")
    for row, length in enumerate(cache.lengths):
        if len(cache.row_token_ids(row)) != length:
            raise RuntimeError(f"row {row} has not {length} tokens")
    for state in cache.states.values():
        if state.shape[0] != cache.offsets[-1]:
            raise RuntimeError("states and offsets differ")
    return True


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the inputs get random bytes, the others a changed header or body in a file that is otherwise whole."""
    import atheris

    random = Random(seed)
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        names = [name for name in header if name != "__metadata__"]
        if random.random() < 0.5 or not names:
            raise ValueError("mutate the bytes")
        if random.random() < 0.4:
            body = atheris.Mutate(body, len(body))
        elif random.random() < 0.4:
            header["__metadata__"][random.choice(sorted(header["__metadata__"]))] = random.choice(WORDS)
        else:
            change_entry(header[random.choice(names)], random)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error):
        return atheris.Mutate(data, max_size)
    text = json.dumps(header).encode()
    return (struct.pack("<Q", len(text)) + text + body)[:max_size]


def change_entry(entry: dict, random: Random) -> None:
    """Another dtype, size or span of a tensor."""
    field = random.choice(("dtype", "shape", "data_offsets"))
    if field == "dtype":
        entry["dtype"] = random.choice(DTYPES)
    elif field == "shape" and random.random() < 0.3:
        entry["shape"] = [*entry["shape"], random.choice(NUMBERS)]
    else:
        entry[field][random.randrange(len(entry[field]))] = random.choice(NUMBERS)


def fuzz(folder: Path, seconds: int) -> None:
    """Run libFuzzer in this process; it exits by itself, with an error on a finding."""
    import atheris

    with atheris.instrument_imports(include=["modeling_xcllama"]):
        import modeling_xcllama  # noqa: F401  (instruments the reader)

    path = folder / "input"

    def one_input(data: bytes) -> None:
        path.write_bytes(data)
        if read_back(path, verify=False):
            read_back(path, verify=True)

    options = [
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={MEMORY_LIMIT_MIB}",
        f"-artifact_prefix={folder}/finding-",
        "-timeout=20",
        "-max_len=4096",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], one_input, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    """Run the fuzzer in a child process, and write what it did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--output", type=Path, help="JSON with what was run and found")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        fuzz(arguments.child, arguments.seconds)
        return
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (folder / "corpus").mkdir()
    seeds = write_seeds(folder / "corpus")
    command = [sys.executable, __file__, "--seconds", str(arguments.seconds), "--child", str(folder)]
    started = time.time()
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    findings = sorted(file.name for file in folder.glob("finding-*"))
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    figures = {
        "atheris": version("atheris"),
        "seconds": round(time.time() - started),
        "seed_files": seeds,
        "inputs": int(runs[1]) if runs else None,
        "coverage": int(covered[-1]) if covered else None,
        "findings": findings,
        "exit_code": done.returncode,
    }
    print(json.dumps(figures, indent=1))
    if arguments.output:
        # not in the child, whose memory is bounded
        from xcllama.provenance import write_result

        write_result(arguments.output, figures, MEASURED)
    if done.returncode or findings:
        print(done.stderr[-4000:], file=sys.stderr)
        raise SystemExit(f"findings in {folder}: {findings or done.returncode}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
