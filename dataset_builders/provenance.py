"""What made a build: command, commit, machine, date and versions."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("datasets", "datasketch", "fsspec", "ijson", "pyarrow", "xcllama")


def provenance() -> dict[str, Any]:
    """Provenance of what this process is doing."""
    root = Path(__file__).resolve().parents[1]
    asked = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    ours = ["dataset_builders", "scripts/build_dataset.py"]
    status = ["git", "-C", str(root), "status", "--porcelain", "-uno", "--", *ours]
    changed = subprocess.run(status, capture_output=True, text=True)
    commit = asked.stdout.strip() if asked.returncode == 0 else "unknown"
    script = os.path.relpath(sys.argv[0], root) if sys.argv[0].startswith(str(root)) else sys.argv[0]
    return {
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "commit": commit + (" with local changes" if changed.stdout.strip() else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
