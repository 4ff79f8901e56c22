"""What every result and every built data set says about the run that made it.

Here, and not in `scripts/`, because builds record it too; `kernels/` is a project of its own and has its own.
"""

import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "transformers", "datasets", "accelerate", "peft", "triton", "lm_eval", "kernels", "safetensors",
    "datasketch", "fsspec", "ijson", "pyarrow",
)  # fmt: skip


def _git(*arguments: str) -> str:
    """What git says of the checkout; "" where there is no git or no checkout."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()


def machine() -> str:
    """Processor, cores and, where torch runs, its threads and accelerator, in one line."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    parts = [model, f"{os.cpu_count()} cores"]
    # builds of data sets do without torch
    if torch := sys.modules.get("torch"):
        accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
        parts += [f"{torch.get_num_threads()} threads", accelerator]
    return ", ".join(parts)


def installed_versions() -> dict[str, str]:
    """Version of each of PACKAGES that is installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def provenance(seed: int | None = None) -> dict[str, Any]:
    """Command, commit, machine, date (UTC), versions and seed of what this process is doing."""
    script = os.path.relpath(sys.argv[0], ROOT) if sys.argv[0].startswith(str(ROOT)) else sys.argv[0]
    # results are what a run changes
    changed = _git("status", "--porcelain", "-uno", "--", ".", ":!results")
    return {
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "commit": (_git("rev-parse", "HEAD") or "unknown") + (" (with uncommitted changes)" if changed else ""),
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": installed_versions(),
        "seed": seed,
    }


def write_result(path: str | Path, figures: dict[str, Any], seed: int | None = None) -> None:
    """Write `figures` with their provenance to `path`, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"provenance": provenance(seed), **figures}, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)
