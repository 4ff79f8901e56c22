"""Rows a second and peak memory of dataset builds on generated input in the official formats, at 1, 10 and 100 times.

    python scripts/benchmark_dataset.py --output results/dataset_benchmark.json

Each build runs in a process of its own; its peak memory is the kernel's VmHWM, interpreter and libraries included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dataset_builders.generated_input import FILES, generate
from xcllama.provenance import require_clean, write_result

MEASURED = ("dataset_builders", "scripts/benchmark_dataset.py")
CHILD = """
import json, sys, time
from dataset_builders.building import build_source
before = time.perf_counter()
table = build_source(sys.argv[1], sys.argv[3], sys.argv[2])
seconds = time.perf_counter() - before
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([table["configs"][sys.argv[1]]["kept"], seconds, int(peak.split()[1]) / 1024]))
"""


def measure(name: str, scale: int) -> dict[str, Any]:
    """Generate, build in a new process, and read off rows, seconds and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILES[name]
        generate(name, path, scale)
        command = [sys.executable, "-c", CHILD, name, str(path), f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows, seconds, peak = json.loads(done.stdout)
        return {
            "source": name,
            "scale": scale,
            "input_mb": round(path.stat().st_size / 1e6, 2),
            "rows": rows,
            "seconds": round(seconds, 2),
            "rows_per_second": round(rows / seconds, 1),
            "peak_memory_mib": round(peak, 1),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--sources", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--scales", nargs="+", type=int, default=[1, 10, 100])
    options = parser.parse_args()
    require_clean(options.output)
    runs = []
    for name in options.sources:
        for scale in options.scales:
            runs.append(measure(name, scale))
            print(runs[-1], flush=True)
    first, last = min(options.scales), max(options.scales)
    peak = {(run["source"], run["scale"]): run["peak_memory_mib"] for run in runs}
    ratios = {name: round(peak[name, last] / peak[name, first], 3) for name in options.sources}
    result = {
        "what": "build_source with one process; seconds without the start of the interpreter",
        "memory_ratio": {"scales": [last, first], "by_source": ratios},
        "load_average": os.getloadavg(),
        "runs": runs,
    }
    write_result(options.output, result, MEASURED)
    print(f"peak memory at {last} x over {first} x: {ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
