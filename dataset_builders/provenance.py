"""What made a build: command, commit, machine, date and versions."""

import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("datasets", "datasketch", "fsspec", "ijson", "pyarrow", "xcllama")


def _git(root: Path, *arguments: str) -> str:
    """What git says of the checkout; "" where there is no git or no checkout."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True).stdout.strip()


def provenance() -> dict[str, Any]:
    """Provenance of what this process is doing."""
    root = Path(__file__).resolve().parents[1]
    commit = _git(root, "rev-parse", "HEAD") or "unknown"
    changed = _git(root, "status", "--porcelain", "-uno", "--", "dataset_builders", "scripts")
    script = os.path.relpath(sys.argv[0], root) if sys.argv[0].startswith(str(root)) else sys.argv[0]
    return {
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "commit": commit + (" with local changes" if changed else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
