"""Documents that wait to be encoded: on disk until they are in the store, so that an accepted one is not lost."""

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from .protocol import ApiError, ContextRequest

logger = logging.getLogger(__name__)

KEPT_FAILURES = 1000


class Uploads:
    """What was accepted and is not in the store yet, or could not be encoded.

    Args:
        folder: where they wait; None: the store takes no documents.
        add: encodes one, (namespace, id, text, metadata, ttl).
        most: that may wait.
    """

    def __init__(self, folder: Path | None, add: Callable[..., Awaitable[None]], most: int):
        self._folder, self._add, self._most = folder, add, most
        self._records: dict[tuple[str, str], dict] = {}
        self._tasks: set[asyncio.Task] = set()

    def start(self) -> None:
        """Go on with what waited when the server stopped."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.glob("*.json")):
            record = json.loads(path.read_text())
            self._records[record["namespace"], record["id"]] = record
            if record["status"] == "encoding":
                self._begin(record)

    async def stop(self) -> None:
        """Leave what waits to the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def submit(self, namespace: str, request: ContextRequest) -> None:
        """Accept a document.

        Raises:
            ApiError: 403 the store takes none; 409 one of this id waits; 429 too many wait.
        """
        if self._folder is None:
            raise ApiError(403, "this server's store is a snapshot: it takes no contexts.", code="read_only")
        known = self._records.get((namespace, request.id))
        if known is not None and known["status"] == "encoding":
            raise ApiError(409, "a context of this id is being encoded.", code="encoding", param="id")
        if len(self._tasks) >= self._most:
            message = "too many contexts wait to be encoded; try again."
            raise ApiError(429, message, code="queue_full", kind="rate_limit_error")
        record = {"namespace": namespace, "status": "encoding", "error": None} | request.model_dump()
        self._records[namespace, request.id] = record
        self._write(record)
        self._begin(record)

    def status(self, namespace: str, name: str) -> dict | None:
        """Status and error of a document that is not in the store, None: nothing is known of it."""
        record = self._records.get((namespace, name))
        return None if record is None else {"id": name, "status": record["status"], "error": record["error"]}

    def listed(self, namespace: str) -> list[dict]:
        """The statuses of all documents of a namespace."""
        return [self.status(*key) for key in sorted(self._records) if key[0] == namespace]

    def forget(self, namespace: str, name: str) -> bool:
        """Drop a document that could not be encoded; returns whether there was one.

        Raises:
            ApiError: 409, it is being encoded.
        """
        record = self._records.get((namespace, name))
        if record is None:
            return False
        if record["status"] == "encoding":
            raise ApiError(409, "this context is being encoded: wait.", code="encoding")
        self._drop(record)
        return True

    def _begin(self, record: dict) -> None:
        task = asyncio.get_running_loop().create_task(self._encode(record))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _encode(self, record: dict) -> None:
        try:
            await self._add(*(record[name] for name in ("namespace", "id", "text", "metadata", "ttl")))
        except ApiError as error:
            logger.warning(f"a context was not encoded: {error.message}")
            record |= {"status": "failed", "error": error.message, "text": ""}
            self._write(record)
            failed = [one for one in self._records.values() if one["status"] == "failed"]
            for old in failed[:-KEPT_FAILURES]:
                self._drop(old)
        else:
            self._drop(record)

    def _path(self, record: dict) -> Path:
        name = json.dumps([record["namespace"], record["id"]]).encode()
        return self._folder / f"{hashlib.blake2b(name, digest_size=16).hexdigest()}.json"

    def _write(self, record: dict) -> None:
        path = self._path(record)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        partial.replace(path)

    def _drop(self, record: dict) -> None:
        self._path(record).unlink(missing_ok=True)
        del self._records[record["namespace"], record["id"]]
