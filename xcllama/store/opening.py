"""How a store's folder is opened: where it lies, whether it is written, what a new store is, and who is refused."""

import logging
import os
import time
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from urllib.parse import quote

from xcllama.durable import sync_folder

from .catalogue import CATALOGUE_NAME, FOREVER
from .shards import dtype_of

logger = logging.getLogger(__name__)


def check_count(name: str, value: int) -> None:
    """Raise a ValueError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r:.80}.")


def expiry(ttl: float | None) -> float:
    """Seconds of the epoch at which something is over that lives for `ttl` seconds; None: never.

    Raises:
        ValueError: `ttl` is no positive number.
    """
    if ttl is None:
        return FOREVER
    if isinstance(ttl, bool) or not isinstance(ttl, Real) or not ttl > 0:
        raise ValueError(f"`ttl` must be seconds above 0, or None, got {ttl!r:.80}.")
    return time.time() + ttl


def namespace_folder(root: str | Path, namespace: str) -> Path:
    """The folder of `namespace` below a store's `root`.

    Raises:
        ValueError: an empty name, one too long for a file name, or one that is no Unicode.
    """
    if isinstance(namespace, str):
        name = quote(namespace.encode("utf-8", "surrogatepass"), safe="")
        if 0 < len(name) <= 197:
            return Path(root) / f"ns={name}"
    raise ValueError(f"`namespace` must be a name of 1 to 197 characters (quoted), got {namespace!r:.80}.")


def opens_read_only(folder: Path, read_only: bool | None) -> bool:
    """Whether a store's folder is only read; None: where it cannot be written. Makes a folder that will be written.

    Raises:
        ValueError: a folder that cannot be written, with `read_only=False` or without a store.
    """
    if read_only:
        return True
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(place, os.W_OK):
        if read_only is False or not (folder / CATALOGUE_NAME).is_file():
            raise ValueError(f"{place} cannot be written; open an existing store with `read_only=True`.")
        logger.warning(f"{folder} cannot be written: the store is open read-only.")
        return True
    for needed in (folder, folder / "shards"):
        if not needed.is_dir():
            needed.mkdir(parents=True, exist_ok=True)
            sync_folder(needed.parent)
    return False


def new_meta(folder: Path, namespace: str, fingerprint: str | None, dtype: str, model, processor) -> dict[str, str]:
    """The description of a store if it is made now; None: not known.

    Raises:
        ValueError: there is none, and nothing says what its states are.
    """
    if fingerprint is None and not (folder / CATALOGUE_NAME).exists():
        raise ValueError(f"{folder} is no store yet: give `model` and `processor` to make one.")
    if dtype == "auto" and model is not None:
        dtype = str(model.dtype).removeprefix("torch.")
    template = "" if processor is None else str(processor.template_version)
    fields = {"namespace": namespace, "dtype": dtype, "template_version": template}
    return fields | {"fingerprint": fingerprint or ""}


def check_opener(
    meta: Mapping[str, str], where: str, fingerprint: str | None, template: str | None, namespace: str, dtype: str
) -> None:
    """Compare the description of a store with what opens it; None: not known, "auto": any.

    Raises:
        ValueError: another model, template, namespace or dtype; both sides are named.
    """
    if fingerprint is not None and meta["fingerprint"] != fingerprint:
        raise ValueError(
            f"{where} holds states of another model, template or version of the weights: its fingerprint is "
            f"{meta['fingerprint']}, the model's {fingerprint}; use that model, or a new store."
        )
    # older stores name no chat template
    if template is not None and meta["template_version"] not in ("", template, template.partition("-")[0]):
        raise ValueError(
            f"{where} was made with template version {meta['template_version']!r}, the processor has "
            f"{template!r}; use the code it was made with, or a new store."
        )
    if meta["namespace"] != namespace:
        raise ValueError(f"{where} is the namespace {meta['namespace']!r}, not {namespace!r}.")
    stored = dtype_of(meta["kind"]) if "kind" in meta else meta["dtype"]
    if dtype != "auto" and stored not in ("auto", dtype):
        raise ValueError(f"{where} holds {stored} states; open it with that `dtype` or 'auto'.")
