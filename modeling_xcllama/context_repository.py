"""A published corpus of contexts, in a folder or on the Hub: fetched, checked against its index, mapped.

`contexts.json` lists safetensors files of packed states (`hidden`, or `key` and `value`, with `token_ids`), each with
size, SHA-256, the ids of its documents and their tokens. A snapshot of `context_store` that was published has one.
"""

import hashlib
import json
import re
from itertools import accumulate
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open

from .context_cache import ContextCache
from .context_file import assemble

INDEX_NAME = "contexts.json"
FORMAT, FORMAT_VERSION = "xcllama-contexts", 1
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?<!\.safetensors)")
FILE_NAME = re.compile(r"(shards/)?\w[\w.-]*\.safetensors")


def load_contexts(path: str | Path, revision: str | None = None, fingerprint: str | None = None) -> ContextCache:
    """The contexts behind `path`, one row a document, in the order of the index.

    Args:
        path: a cache file, a folder with an index, or the id of a data set repository with one ("org/name").
        revision: branch, tag or commit on the Hub; None: the main branch.
        fingerprint: of the model that will read them; the states of another are not even fetched. None: any.

    Raises:
        ValueError: a revision of something local, no index, another fingerprint, or a file that is not what the index
            says.
        huggingface_hub.errors.HfHubHTTPError: no such repository or revision, or no access to it.
    """
    folder = Path(path)
    if folder.exists() or not HUB_ID.fullmatch(str(path)):
        if revision is not None:
            raise ValueError(f"`revision` is for a repository on the Hub, got {revision!r} for the file {path}.")
    else:
        where = {"repo_id": str(path), "repo_type": "dataset"}
        index = Path(hf_hub_download(**where, filename=INDEX_NAME, revision=revision))
        _read_index(index.parent, fingerprint)
        # the folder bears the commit's name: what follows is of the same commit, whatever moves meanwhile
        folder = Path(snapshot_download(**where, revision=index.parent.name, allow_patterns="*.safetensors"))
    return load_folder(folder) if folder.is_dir() else ContextCache.load(folder)


def load_folder(folder: Path) -> ContextCache:
    """The contexts of a local folder, every file compared with the index before it is mapped.

    Raises:
        ValueError: no index, one of a newer format, or a file that is missing or altered.
    """
    index = _read_index(folder)
    try:
        caches = [_map(folder, entry, index) for entry in index["files"]]
        return caches[0] if len(caches) == 1 else ContextCache.concat(caches)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"the contexts in {folder} cannot be read: {error}; fetch them again.") from error


def _read_index(folder: Path, fingerprint: str | None = None) -> dict:
    try:
        index = json.loads((folder / INDEX_NAME).read_text())
        named, version, made_by = index["format"], int(index["format_version"]), index["fingerprint"]
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no published corpus of contexts: it has no {INDEX_NAME}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX_NAME} is no index of contexts: {error!r}.") from error
    if named != FORMAT or version > FORMAT_VERSION:
        raise ValueError(f"{folder} has format {named!r} {version}, expected {FORMAT!r} up to {FORMAT_VERSION}.")
    if fingerprint not in (None, made_by):
        raise ValueError(
            f"the contexts in {folder} were made by another model, template or version of the weights: their "
            f"fingerprint is {made_by}, the model's {fingerprint}; encode the texts again."
        )
    return index


def _map(folder: Path, entry: dict, index: dict) -> ContextCache:
    """One file of the index as a cache. The index comes from outside, too: nothing in it is trusted."""
    if not FILE_NAME.fullmatch(entry["name"]):
        raise ValueError(f"the index names the file {entry['name']!r}")
    path = folder / entry["name"]
    if not path.is_file() or path.stat().st_size != entry["nbytes"]:
        raise ValueError(f"{entry['name']} is missing or has not the {entry['nbytes']} bytes that the index says")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise ValueError(f"{entry['name']} has another SHA-256 than the index says")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    offsets = torch.tensor([0, *accumulate(map(int, entry["tokens"]))])
    tensors |= {"offsets": offsets, "rows": torch.arange(len(offsets) - 1), "row_offsets": torch.arange(len(offsets))}
    states, bounds, rows = assemble(index, tensors)
    return ContextCache(states, bounds, tensors["token_ids"], str(index["fingerprint"]), rows)
