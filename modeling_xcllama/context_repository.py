"""Where a published corpus of contexts lies: the files of a snapshot, from a folder or the Hub, checked before use.

A snapshot (`context_store`) is a folder with `manifest.json` and the cache files that it names, each with its SHA-256. On
the Hub it is a data set repository.
"""

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download

MANIFEST_NAME = "manifest.json"
FORMAT, FORMAT_VERSION = "xcllama-context-snapshot", 1
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.safetensors)")


def context_files(path: str | Path, revision: str | None = None) -> list[Path]:
    """The cache files behind `path`, in the order of their rows.

    Args:
        path: a cache file, the folder of a snapshot, or the id of a data set repository with one ("org/name").
        revision: branch, tag or commit on the Hub; None: the main branch.

    Raises:
        ValueError: a revision of something local, no snapshot, or a file that is not what the manifest says.
        huggingface_hub.errors.HfHubHTTPError: no such repository or revision, or no access to it.
    """
    local = Path(path)
    if local.exists() or not HUB_ID.fullmatch(str(path)):
        if revision is not None:
            raise ValueError(f"`revision` is for a repository on the Hub, got {revision!r} for the file {path}.")
        return snapshot_files(local) if local.is_dir() else [local]
    patterns = [MANIFEST_NAME, "shards/*"]
    return snapshot_files(
        Path(snapshot_download(str(path), repo_type="dataset", revision=revision, allow_patterns=patterns))
    )


def snapshot_files(folder: Path) -> list[Path]:
    """The cache files of a local snapshot, each with the size and SHA-256 that its manifest gives.

    Raises:
        ValueError: no snapshot, one of a newer format, or a file that is missing or altered.
    """
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        named, version = (manifest["format"], int(manifest["format_version"]))
        entries = [(str(entry["name"]), int(entry["nbytes"]), str(entry["sha256"])) for entry in manifest["shards"]]
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no snapshot of contexts: it has no {MANIFEST_NAME}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST_NAME} is no snapshot's manifest: {error!r}.") from error
    if named != FORMAT or version > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format {named!r} {version}, this code reads {FORMAT!r} up to {FORMAT_VERSION}."
        )
    if not entries:
        raise ValueError(f"the snapshot {folder} holds no documents.")
    return [_checked(folder, *entry) for entry in entries]


def _checked(folder: Path, name: str, nbytes: int, sha256: str) -> Path:
    # the name comes from outside: one folder down, nothing else
    if not re.fullmatch(r"shards/[\w][\w.-]*", name):
        raise ValueError(f"the manifest of {folder} names the file {name!r}; it must lie in shards/.")
    path = folder / name
    if not path.is_file() or path.stat().st_size != nbytes:
        raise ValueError(
            f"{path} is missing or cut short: the manifest says {nbytes} bytes; fetch the snapshot again."
        )
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(f"{path} has another SHA-256 than its manifest says; fetch the snapshot again.")
    return path
