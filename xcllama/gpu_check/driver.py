"""The parts one after the other, each a process with a deadline: the whole ends in time, with what it has."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from xcllama.provenance import ROOT, require_clean

# shares of the time; what a part leaves goes to those after it
SHARES = {"kernels": 2, "model": 2, "train": 5}
PARTS = tuple(SHARES)
# seconds that are left when the check ends, when a part should have ended, when it is interrupted
LAST, SPARE, GRACE = 2.0, 8.0, 5.0
# seconds for an export when a user interrupts
PATIENCE = 60.0


@dataclass(frozen=True)
class Check:
    """What to run.

    Args:
        output: folder of the results.
        minutes: the check ends before.
        parts: of `PARTS`, in this order.
        base, data: folders of the decoder and of a token pool; None: tiny random ones.
        dry_run: on the CPU, with tiny sizes.
    """

    output: Path
    minutes: float
    parts: tuple[str, ...]
    base: Path | None
    data: Path | None
    dry_run: bool


def run_check(check: Check, script: Path) -> int:
    """Run the parts by `script --part NAME --deadline T`, and say in check.json how each ended.

    Returns:
        0 if every part did what it should.

    Raises:
        ValueError: see `require_clean`.
    """
    end = time.monotonic() + 60 * check.minutes - LAST
    require_clean(check.output)
    check.output.mkdir(parents=True, exist_ok=True)
    ended = {}
    with terminated_like_interrupted():
        for place, part in enumerate(check.parts):
            shares = [SHARES[name] for name in check.parts[place:]]
            begin = time.monotonic()
            seconds = (end - begin) * shares[0] / sum(shares)
            print(f"{part}: {seconds:.0f} seconds at most", flush=True)
            code = run_for(command_of(check, script, part, begin + seconds - SPARE), begin + seconds, check.dry_run)
            ended[part] = {"exit": code, "seconds": round(time.monotonic() - begin, 1)}
            print(f"{part}: ended with {code} after {ended[part]['seconds']} seconds", flush=True)
            (check.output / "check.json").write_text(json.dumps({"minutes": check.minutes, "parts": ended}) + "\n")
            if code == -signal.SIGINT:
                break
    return 0 if [part["exit"] for part in ended.values()] == [0] * len(check.parts) else 1


def command_of(check: Check, script: Path, part: str, deadline: float) -> list[str]:
    """The command line of a part."""
    command = [sys.executable, str(script), "--part", part, "--deadline", str(deadline), "--output", str(check.output)]
    for name, folder in (("--base", check.base), ("--data", check.data)):
        command += [] if folder is None else [name, str(folder.resolve())]
    return command + ["--dry-run"] * check.dry_run


def run_for(command: list[str], end: float, dry_run: bool) -> int:
    """The exit code of `command`, interrupted shortly before `end` and killed then, with its children.

    Returns:
        -SIGINT if this process was interrupted meanwhile.
    """
    process = subprocess.Popen(command, cwd=ROOT, env=environment(dry_run), start_new_session=True)
    try:
        return process.wait(max(0.0, end - GRACE - time.monotonic()))
    except subprocess.TimeoutExpired:
        return _end(process, GRACE)
    except KeyboardInterrupt:
        _end(process, min(PATIENCE, end - time.monotonic()))
        return -signal.SIGINT


def environment(dry_run: bool) -> dict[str, str]:
    """The environment of a part: nothing is fetched; a dry run sees no GPU and interprets the kernels."""
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if dry_run:
        return variables | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    variables.pop("TRITON_INTERPRET", None)
    return variables


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the check as Ctrl-C does, with an export; both, too, where a shell started it in the background."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen, grace: float) -> int:
    os.killpg(process.pid, signal.SIGINT)
    try:
        return process.wait(max(0.0, grace))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()
