"""The parts one after the other, each a process with a deadline: the whole ends in time, with what it has."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from xcllama.provenance import ROOT

# shares of the time; what a part leaves goes to those after it
SHARES = {"kernels": 2, "model": 2, "train": 5}
PARTS = tuple(SHARES)
# seconds before a part's end at which it should be done, is interrupted; what it gets when a user interrupts it
SPARE, GRACE, PATIENCE = 8.0, 5.0, 60.0


@dataclass(frozen=True)
class Check:
    """What to run.

    Args:
        output: folder of the results.
        minutes: the check ends before.
        parts: of `PARTS`, in this order.
        arguments: of every part's command line.
        dry_run: on the CPU, with tiny sizes.
    """

    output: Path
    minutes: float
    parts: tuple[str, ...]
    arguments: tuple[str, ...]
    dry_run: bool


def run_check(check: Check, script: Path) -> int:
    """Run the parts by `script --part NAME --seconds N`, and say in gpu_check.json how each ended.

    Returns:
        0 if every part did what it should.
    """
    check.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * check.minutes - 2
    ended = {}
    for place, part in enumerate(check.parts):
        shares = [SHARES[name] for name in check.parts[place:]]
        seconds = (deadline - time.monotonic()) * shares[0] / sum(shares)
        command = [sys.executable, str(script), "--part", part, "--seconds", f"{seconds - SPARE:.1f}"]
        command += ["--output", str(check.output), *check.arguments]
        print(f"{part}: {seconds:.0f} seconds at most", flush=True)
        begin = time.monotonic()
        code = run_for(command, seconds, environment(check.dry_run))
        ended[part] = {"exit": code, "seconds": round(time.monotonic() - begin, 1)}
        print(f"{part}: ended with {code} after {ended[part]['seconds']} seconds", flush=True)
        (check.output / "gpu_check.json").write_text(json.dumps({"minutes": check.minutes, "parts": ended}) + "\n")
        if code == -signal.SIGINT:
            break
    return 0 if all(part["exit"] == 0 for part in ended.values()) and len(ended) == len(check.parts) else 1


def environment(dry_run: bool) -> dict[str, str]:
    """The environment of a part: nothing is fetched; a dry run sees no GPU and interprets the kernels."""
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if dry_run:
        return variables | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    variables.pop("TRITON_INTERPRET", None)
    return variables


def run_for(command: list[str], seconds: float, variables: dict[str, str]) -> int:
    """The exit code of `command`, interrupted shortly before `seconds` and killed at their end, with its children."""
    process = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True)
    try:
        return process.wait(max(0.0, seconds - GRACE))
    except subprocess.TimeoutExpired:
        return _end(process, GRACE)
    except KeyboardInterrupt:
        _end(process, PATIENCE)
        return -signal.SIGINT


def _end(process: subprocess.Popen, grace: float) -> int:
    os.killpg(process.pid, signal.SIGINT)
    try:
        return process.wait(grace)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()
