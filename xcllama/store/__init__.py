"""Corpora of encoded contexts: a store in a folder, snapshots to share, bulk encoding."""

from .adding import AddReport
from .reading import DamagedDocumentError, MissingDocumentError, VerifyReport
from .search import Hit
from .snapshots import pull
from .store import ContextStore
from .upkeep import Handle

__all__ = [
    "AddReport",
    "ContextStore",
    "DamagedDocumentError",
    "Handle",
    "Hit",
    "MissingDocumentError",
    "VerifyReport",
    "pull",
]
