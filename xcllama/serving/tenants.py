"""API keys and the namespaces they stand for: no request ever names a namespace."""

import hashlib
import hmac
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from .protocol import ApiError


@dataclass(frozen=True)
class _Key:
    digest: bytes
    namespace: str
    expires: float


class Tenants:
    """Who may ask, and whose contexts they read.

    Args:
        path: a file with a line a key, `KEY NAMESPACE [EXPIRES]` (ISO 8601, UTC where it names no zone); lines that
            start with # are comments. None: everybody reads `namespace`, no key is asked for.
        namespace: of everybody, without a file.

    Raises:
        ValueError: a line that says something else, two lines with one key, or a file without keys.
        FileNotFoundError: no such file.
    """

    def __init__(self, path: str | Path | None = None, namespace: str = "default"):
        self._namespace = namespace
        self._keys: list[_Key] | None = None if path is None else _read(Path(path))

    @property
    def namespaces(self) -> list[str]:
        """All of them."""
        return [self._namespace] if self._keys is None else sorted({key.namespace for key in self._keys})

    def namespace_of(self, authorization: str | None) -> str:
        """The namespace of whoever sends this `Authorization` header.

        Raises:
            ApiError: 401, no key, an unknown one or an expired one.
        """
        if self._keys is None:
            return self._namespace
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise _refused("no API key; send the header `Authorization: Bearer KEY`.")
        digest, found = _digest(given.strip()), None
        # every key is compared, in constant time: how long it takes says nothing about any of them
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        if found is None:
            raise _refused("this API key is not known.")
        if found.expires < time.time():
            raise _refused("this API key has expired.")
        return found.namespace


def _refused(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", kind="authentication_error")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read(path: Path) -> list[_Key]:
    keys: list[_Key] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        # the line itself may hold a key: it is not shown
        if not 2 <= len(words) <= 3:
            raise ValueError(f"line {number} of {path} must be `KEY NAMESPACE [EXPIRES]`, got {len(words)} words.")
        expires = float("inf")
        if len(words) == 3:
            try:
                when = datetime.fromisoformat(words[2])
            except ValueError:
                raise ValueError(f"line {number} of {path}: {words[2]!r} is no ISO 8601 date.") from None
            expires = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        keys.append(_Key(_digest(words[0]), words[1], expires))
    if not keys:
        raise ValueError(f"{path} has no keys; add a line `KEY NAMESPACE`.")
    if len({key.digest for key in keys}) < len(keys):
        raise ValueError(f"{path} has a key twice: a key stands for one namespace.")
    return keys
