"""Corpora of encoded contexts: a store in a folder, snapshots to share, bulk encoding."""

from .pending import AddReport, VerifyReport
from .reading import DamagedDocumentError, MissingDocumentError
from .searching import Hit
from .store import ContextStore, Handle

__all__ = [
    "AddReport",
    "ContextStore",
    "DamagedDocumentError",
    "Handle",
    "Hit",
    "MissingDocumentError",
    "VerifyReport",
]
