"""What the commands on a store share: their arguments, and how store and model are opened."""

from pathlib import Path
from typing import Annotated

import typer

CHECKPOINT = "checkpoints/xc-smollm2-135m"

Store = Annotated[str, typer.Argument(help="Folder of a store; where it is only read also a snapshot: URL or Hub id.")]
Namespace = Annotated[str | None, typer.Option(help="Part of the store; the default one has no name.")]
Model = Annotated[
    str | None, typer.Option(help="Added weights, model folder or Hub id; default: what made the store.")
]
Where = Annotated[str | None, typer.Option(help='JSON of metadata that documents must have: {"lang": "en"}.')]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
K = Annotated[int, typer.Option("-k", min=1, help="Passages to find.")]


def is_store(store: str, namespace: str | None = None) -> bool:
    """Whether a folder is a store (with that namespace): one of documents, or an empty one, is none."""
    from xcllama.store.catalogue import CATALOGUE_NAME
    from xcllama.store.opening import namespace_folder

    if namespace is not None:
        return (namespace_folder(store, namespace) / CATALOGUE_NAME).is_file()
    return any(Path(store).glob(f"ns=*/{CATALOGUE_NAME}"))


def require_store(store: str) -> None:
    """Refuse a name that is neither a store's nor, as far as the name tells, a snapshot's.

    Raises:
        ValueError: there is none.
    """
    from xcllama.store.manifest import is_snapshot

    if not is_snapshot(store) and not is_store(store):
        raise ValueError(f"no store at {store}; make one with `xcllama store add STORE FOLDER`.")


def open_store(store: str, namespace: str | None, model=None, processor=None, **options):
    """The store, or the snapshot, that is named.

    Raises:
        ValueError: there is none.
    """
    from xcllama.store import ContextStore

    require_store(store)
    return ContextStore.open(store, model, processor, namespace, **options)


def load(name: str | None, store: str, namespace: str | None, is_new: bool = False):
    """Model, processor and the model's name: as given, as the store says, or the repository's checkpoint.

    Args:
        is_new: the store may be made now: its name is a folder's, never a snapshot's.
    """
    if not is_new:
        require_store(store)
    if name is None and (not is_new or is_store(store, namespace or "default")):
        with open_store(store, namespace) as opened:
            name = opened.catalogue.meta["model"] or None
    name = name or (CHECKPOINT if Path(CHECKPOINT).is_dir() else None)
    if name is None:
        raise ValueError("nothing says which model encodes: name one with --model.")
    from xcllama.models import load_for_command

    return *load_for_command(name), str(Path(name).absolute()) if Path(name).is_dir() else name
