"""Handles: documents pinned against eviction."""

from modeling_xcllama.context_cache import ContextCache


class Handle:
    """Pinned documents: not evicted before `release`, the end of a `with` block or the end of its time.

    Attributes:
        ids: the documents.
        token: names the handle in other processes (`ContextStore.release`).
        expires: seconds of the epoch.
    """

    def __init__(self, store, ids: list[str], token: str, expires: float):
        self.ids, self.token, self.expires = ids, token, expires
        self._store = store

    def get(self) -> ContextCache:
        """The documents' states."""
        return self._store.get(self.ids)

    def release(self) -> None:
        """Let the documents be evicted again."""
        self._store.release(self.token)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception) -> None:
        self.release()
