"""What a build is asked for, besides its files."""

import hashlib
import json
import random
from dataclasses import dataclass
from typing import Any


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
