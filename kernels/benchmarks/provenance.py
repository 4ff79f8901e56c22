"""Where, when and with what a run was made, and how its results are written."""

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent.parent


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def provenance(script: Path, device: str) -> dict[str, object]:
    """Command, commit, date, machine and versions of a run of `script`."""
    return {
        "command": shlex.join(["python", str(script.resolve().relative_to(ROOT)), *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--short", "kernels")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {device}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
    }


def _text(value: object) -> str:
    if isinstance(value, list):
        return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in value) + "\n]"
    return json.dumps(value)


def write_json(path: Path, content: dict) -> None:
    """Write whole or not at all; lists have a line a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = ",\n".join(f"{json.dumps(name)}: {_text(value)}" for name, value in content.items())
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        file.write("{\n" + fields + "\n}\n")
    os.replace(file.name, path)
