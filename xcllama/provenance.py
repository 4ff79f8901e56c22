"""Where a figure comes from: what every results file says about the run that made it, and the one way to write it."""

import ast
import contextlib
import datetime
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from xcllama.durable import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "results"
# beside the code of a packed folder, which is no checkout
ORIGIN = "origin.json"
# written by runs and identified by digests of their own, or rendered: no part of the code that is measured
OUTPUTS = (RESULTS, "checkpoints", "docs", "README.md")
PACKAGES = (
    "torch", "transformers", "datasets", "accelerate", "peft", "triton", "lm_eval", "kernels", "safetensors",
    "datasketch", "fsspec", "ijson", "pyarrow", "xcllama",
)  # fmt: skip
# what changes how torch computes
VARIABLES = ("OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "TRITON_INTERPRET")


def provenance(measured: Sequence[str], seed: int | None = None) -> dict[str, Any]:
    """Command, commit, code, machine, date (UTC), versions and seed of what this process is doing.

    Args:
        measured: files and folders of the repository whose code made the figure, as "modeling_xcllama".
    """
    torch = sys.modules.get("torch")
    return {
        "command": command(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **tree(),
        "code": {"measured": sorted(measured), "digest": code_digest(*sorted(measured))},
        "machine": machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if torch else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions(),
        "seed": seed,
    }


def command() -> str:
    """The command line of this process, from the root of the repository."""
    interpreter, *arguments = sys.orig_argv
    # what pip installed beside the interpreter is called by its name
    if arguments and Path(arguments[0]).parent == Path(interpreter).parent:
        words = [Path(arguments[0]).name, *arguments[1:]]
    else:
        words = ["python", *arguments]
    return shlex.join(word.removeprefix(f"{ROOT}/") for word in words)


@functools.cache
def tree() -> dict[str, Any]:
    """Full commit, and whether code differed from it, when this process first asked; None outside a checkout.

    Of a packed folder (`xcllama.gpu_check.packing`), what was packed.
    """
    if (ROOT / ORIGIN).is_file():
        return json.loads((ROOT / ORIGIN).read_text())
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", *(f":!{name}" for name in OUTPUTS))
    return {"commit": commit or None, "dirty": bool(changed) if commit else None}


def _git(*arguments: str) -> str:
    """What git says of the checkout; "" where there is no git or no checkout."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()


@functools.cache
def code_digest(*measured: str) -> str | None:
    """SHA-256 of the code in files and folders, comments, docstrings and layout aside; None: one is not there."""
    digest = hashlib.sha256()
    for name in measured:
        place = ROOT / name
        if not place.exists():
            return None
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.suffix == ".py":
                digest.update(f"{file.relative_to(ROOT)}\n{_code(file.read_text())}\n".encode())
            elif file.suffix == ".yaml":
                digest.update(f"{file.relative_to(ROOT)}\n{file.read_text()}\n".encode())
    return digest.hexdigest()


def _code(source: str) -> str:
    """Python source without what a run does not see."""
    code = ast.parse(source)
    for node in ast.walk(code):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(code)


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


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of those `packages` that are installed."""
    installed = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def require_clean(path: str | Path | None) -> None:
    """Refuse a place in results/ from a tree with uncommitted changes; call it before a long measurement.

    Args:
        path: of the file, or of its folder; None: nothing will be written.

    Raises:
        ValueError: it lies there, and the tree is dirty.
    """
    place = Path(path or "/").resolve()
    if place.is_relative_to(ROOT / RESULTS) and tree()["dirty"]:
        instead = Path("runs") / place.relative_to(ROOT / RESULTS)
        raise ValueError(
            f"{RESULTS}/ holds figures of committed code only, and this tree has uncommitted changes; commit them, or "
            f"write to {instead} instead."
        )


def write_result(path: str | Path, figures: dict[str, Any], measured: Sequence[str], seed: int | None = None) -> None:
    """Write `figures` with their provenance to `path`, whole or not at all; items of lists take a line each.

    Raises:
        ValueError: see `require_clean`.
    """
    require_clean(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _layout({"provenance": provenance(measured, seed), **figures}) + "\n")


def _layout(value: Any, indent: str = "") -> str:
    if isinstance(value, dict) and value:
        lines = [f"{indent} {json.dumps(str(name))}: {_layout(item, indent + ' ')}" for name, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        lines = [f"{indent} {json.dumps(item, ensure_ascii=False)}" for item in value]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def is_current(run: dict[str, Any]) -> bool:
    """Whether the code of a figure is now as it was; of runs that did not say what they measure, it is not."""
    code = run.get("code")
    return code is not None and code["digest"] == code_digest(*code["measured"]) is not None


def caption(run: dict[str, Any]) -> str:
    """Command, commit, machine and date of a provenance in one line, and whether its code is as it was."""
    made_by = f"commit {run['commit']}" if run["commit"] else f"xcllama {run['versions']['xcllama']}"
    parts = [f"`{run['command']}`", made_by]
    parts += ["with uncommitted changes"] if run["dirty"] else []
    parts += [run["date"][:10], run["machine"]]
    parts += [run["cpu_capability"]] if run.get("cpu_capability") else []
    state = "code of this figure unchanged" if is_current(run) else "measured before its code changed"
    return f"{', '.join(parts)}: {state}"


def age(run: dict[str, Any]) -> str:
    """How many commits ago a run was made, as "3 commits ago"; where its commit is not in this history, says so."""
    commits = _git("rev-list", "--count", f"{run['commit']}..HEAD")
    return f"{commits} commits ago" if commits else "at a commit that is not in this history"
