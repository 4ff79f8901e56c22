"""What every results/*.json says about the run that made it: command, commit, machine, date, versions, seed."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "triton", "lm_eval", "kernels", "safetensors")


def machine() -> str:
    """Processor, cores and accelerator of this machine, in one line."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}"


def provenance(seed: int | None = None) -> dict:
    """The fields that make a measured run repeatable."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    changed = subprocess.run(
        ["git", "status", "--porcelain"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip() + (" (with uncommitted changes)" if changed.stdout.strip() else ""),
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": installed,
        "seed": seed,
    }


def write_result(path: str | Path, figures: dict, seed: int | None = None) -> None:
    """Write `figures` with their provenance to `path`, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"provenance": provenance(seed), **figures}, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)
