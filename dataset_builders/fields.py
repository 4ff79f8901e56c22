"""What converters read: the fields of a record, typed, and the settings of a build."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dataset_builders.schema import RecordError, Repair

_NAMES = {str: "a string", list: "a list", dict: "an object", int: "an integer", bool: "true or false"}


def get(record: Any, name: str, kind: type, where: str = "") -> Any:
    """Field `name` of `record`, checked to be a `kind`; `where` is the path to `record`, ending in a dot.

    Raises:
        RecordError: the record is no object, the field is missing, or of another type.
    """
    if not isinstance(record, dict):
        raise RecordError(where.rstrip(".") or "record", f"must be an object, got {type(record).__name__}")
    if name not in record:
        raise RecordError(where + name, f"is missing; the record has {', '.join(map(str, record)) or 'no field'}")
    value = record[name]
    # true is an instance of int
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RecordError(where + name, f"must be {_NAMES[kind]}, got {type(value).__name__}")
    return value


def get_strings(record: Any, name: str, where: str = "") -> list[str]:
    """Field `name` of `record`, checked to be a list of strings."""
    values = get(record, name, list, where)
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise RecordError(f"{where}{name}[{index}]", f"must be a string, got {type(value).__name__}")
    return values


def zip_columns(record: Any, names: tuple[str, ...], where: str = "") -> list[tuple[Any, ...]]:
    """The rows of `record`'s columns `names`, checked to be lists of one length."""
    columns = [get(record, name, list, where) for name in names]
    for name, column in zip(names, columns, strict=True):
        if len(column) != len(columns[0]):
            rule = f"must be as long as `{names[0]}` ({len(columns[0])}), got {len(column)}"
            raise RecordError(where + name, rule)
    return list(zip(*columns, strict=True))


def readable(read: Callable[[int, Any], Any], items: list[Any]) -> tuple[list[Any], list[Repair]]:
    """`read(index, item)` of each item; of several, those that cannot be read are left out, a repair for each.

    Raises:
        RecordError: none of the items can be read.
    """
    values, errors = [], []
    for index, item in enumerate(items):
        try:
            values.append(read(index, item))
        except RecordError as error:
            errors.append(error)
    if errors and not values:
        raise errors[0]
    return values, [Repair(error.reason) for error in errors]


@dataclass(frozen=True)
class Settings:
    """What converters may depend on besides the record.

    Args:
        seed: of everything shuffled or drawn inside a row; never of what is train, validation or test.
        num_copies: rows for one question of HotpotQA, each with its paragraphs in another order.
        nq_open: normalized questions of NQ-open, the only ones kept of Natural Questions; None: all.
    """

    seed: int = 0
    num_copies: int = 1
    nq_open: frozenset[str] | None = None

    def __post_init__(self):
        if self.num_copies < 1:
            raise ValueError(f"`num_copies` must be at least 1, got {self.num_copies}.")

    def digest(self) -> str:
        """Digest of all settings."""
        questions = sorted(self.nq_open) if self.nq_open is not None else None
        content = json.dumps([self.seed, self.num_copies, questions])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def random(self, *key: Any) -> random.Random:
        """A generator of its own for each key (a question), so that results do not depend on the order of reading."""
        return random.Random(":".join(map(str, (self.seed, *key))))
