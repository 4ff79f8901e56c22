"""Room on the disk: what is removed, in which order, and how the room that dead states leave is won back.

A bound counts shard files. Shards are at most an eighth of it, and an eighth is kept free, so that a shard can be
written anew without its dead states before the old one goes: the bound holds at every moment.
"""

import fcntl
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from modeling_xcllama.context_cache import ContextCache
from xcllama.durable import locked

from .catalogue import Catalogue, Location, enter_shard
from .shards import DamagedShardError, MappedShard, new_shard_name, write_shard

USES_KEPT = 10_000
STATES = "SELECT 0, state, shard, start, tokens, checksum FROM states WHERE shard = ? ORDER BY start"
# shard, bytes of live states, bytes of dead ones, where no state is damaged
ALIVE = (
    "SELECT shard, SUM(nbytes), state_bytes - SUM(nbytes) FROM states JOIN (SELECT shard, state_bytes FROM shards "
    "WHERE live) AS shards USING (shard) GROUP BY shard HAVING NOT SUM(damaged) ORDER BY shard"
)
UNPINNED = (
    "SELECT document, (SELECT TOTAL(nbytes) FROM passages JOIN states USING (state) WHERE passages.document = "
    "documents.document) FROM documents WHERE NOT EXISTS (SELECT 1 FROM pins WHERE pins.document = documents.document "
    "AND pins.expires > ?) ORDER BY last_used, document"
)


@dataclass(frozen=True)
class Handle:
    """Pinned documents: not evicted before `release`, the end of a `with` block or the end of its time.

    Args:
        store: that has them.
        ids: the documents.
        token: names the handle in other processes (`ContextStore.release`).
        expires: seconds of the epoch.
    """

    store: Any
    ids: list[str]
    token: str
    expires: float

    def get(self) -> ContextCache:
        """The documents' states."""
        return self.store.get(self.ids)

    def release(self) -> None:
        """Let the documents be evicted again."""
        self.store.release(self.token)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception) -> None:
        self.release()


class Room:
    """What a namespace takes on the disk.

    Args:
        catalogue: of the namespace, whose folder has its shards.
        max_bytes: most bytes of shard files; None: as the store was made.
        shard_bytes: size of a full shard.
    """

    def __init__(self, catalogue: Catalogue, max_bytes: int | None, shard_bytes: int):
        self.catalogue, self.folder = catalogue, catalogue.path.parent
        stored = catalogue.meta["max_bytes"]
        if max_bytes is not None and str(max_bytes) != stored and not catalogue.read_only:
            catalogue.set_meta("max_bytes", str(max_bytes))
        self.max_bytes = max_bytes = max_bytes or int(stored or 0) or None
        self.shard_bytes = shard_bytes if max_bytes is None else min(shard_bytes, max(max_bytes // 8, 1))
        self._used: dict[int, float] = {}
        self._lock = threading.Lock()

    def use(self, documents: Iterable[int]) -> None:
        """Remember that documents were read just now, by their numbers."""
        with self._lock:
            self._used.update(dict.fromkeys(documents, time.time()))
        if len(self._used) > USES_KEPT:
            self.flush()

    def flush(self) -> None:
        """Write down when documents were last used."""
        with self._lock:
            used, self._used = self._used, {}
        if used:
            with self.catalogue.transaction() as connection:
                rows = [(moment, number) for number, moment in used.items()]
                connection.executemany("UPDATE documents SET last_used = MAX(last_used, ?) WHERE document = ?", rows)

    def clean(self) -> None:
        """Delete what killed writers left, unless a writer is at work: files of no shard, room that was reserved."""
        with locked(self.folder / "writers.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
            if alone:
                with self.catalogue.transaction() as connection:
                    connection.execute("DELETE FROM shards WHERE NOT live")
                    known = {row[0] for row in connection.execute("SELECT name FROM shards")}
                for path in (self.folder / "shards").iterdir():
                    if path.name not in known:
                        path.unlink(missing_ok=True)

    def pin(self, handle: str, ids: Sequence[str], expires: float) -> list[str]:
        """Keep documents from eviction; returns the ids that are not there, and then pins none."""
        with self.catalogue.transaction() as connection:
            query, now = "SELECT document FROM documents WHERE id = ? AND expires > ?", time.time()
            found = {name: connection.execute(query, (name, now)).fetchone() for name in ids}
            missing = [name for name, row in found.items() if row is None]
            if not missing:
                rows = [(handle, *row, expires) for row in found.values()]
                connection.executemany("INSERT OR REPLACE INTO pins VALUES (?, ?, ?)", rows)
        return missing

    def unpin(self, handle: str) -> None:
        """Release a handle."""
        with self.catalogue.transaction() as connection:
            connection.execute("DELETE FROM pins WHERE handle = ?", (handle,))

    def remove(self, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """Delete documents, all or none; returns the ids that are not there, and those that are pinned."""
        with self.catalogue.transaction() as connection:
            query = "SELECT document FROM documents WHERE id = ?"
            rows = {name: connection.execute(query, (name,)).fetchone() for name in ids}
            query, now = "SELECT 1 FROM pins WHERE document = ? AND expires > ?", time.time()
            missing = [name for name, row in rows.items() if row is None]
            pinned = [name for name, row in rows.items() if row and connection.execute(query, (*row, now)).fetchone()]
            if not missing and not pinned:
                connection.executemany("DELETE FROM documents WHERE document = ?", rows.values())
        self.catalogue.drop_dead_shards()
        return missing, pinned

    def remove_dead(self) -> int:
        """Delete what is over, and states that nothing reads; returns how many documents."""
        now = time.time()
        with self.catalogue.transaction() as connection:
            connection.execute("DELETE FROM pins WHERE expires <= ?", (now,))
            count = connection.execute("DELETE FROM documents WHERE expires <= ?", (now,)).rowcount
            connection.execute(
                "DELETE FROM states WHERE NOT EXISTS (SELECT 1 FROM passages WHERE passages.state = states.state)"
            )
        self.catalogue.drop_dead_shards()
        return count

    def _remove_least_recently_used(self, nbytes: int) -> int:
        """Delete unpinned documents worth `nbytes` of states; returns how many."""
        gone, freed = [], 0
        with self.catalogue.transaction() as connection:
            for document, size in connection.execute(UNPINNED, (time.time(),)):
                if freed >= nbytes:
                    break
                gone.append((document,))
                freed += size
            connection.executemany("DELETE FROM documents WHERE document = ?", gone)
        return len(gone)

    def reserve(self, needed: int, name: str) -> int:
        """Make room for a shard in a bounded store; see `make`."""
        # a shard's size is kept free for rewriting one
        return self.make(needed, self.max_bytes - self.shard_bytes, name)

    def make(self, needed: int, limit: float, name: str | None = None) -> int:
        """Evict until `needed` more bytes of shards fit below `limit`, and reserve them for the shard `name`.

        Returns:
            Documents evicted.

        Raises:
            ValueError: it does not fit even when all that may go is gone.
        """
        self.flush()
        evicted, headers = 0, 0
        with locked(self.folder / "eviction.lock"):
            while True:
                evicted += self.remove_dead()
                with self.catalogue.transaction() as connection:
                    total, reserved = connection.execute(
                        "SELECT TOTAL(nbytes), TOTAL(nbytes * (NOT live)) FROM shards"
                    ).fetchone()
                    alive = connection.execute("SELECT TOTAL(nbytes) FROM states").fetchone()[0]
                    if total + needed <= limit:
                        if name is not None:
                            connection.execute(
                                "INSERT INTO shards(name, nbytes, live) VALUES (?, ?, 0)", (name, needed)
                            )
                        return evicted
                excess = alive + reserved + needed + headers - limit
                if excess > 0:
                    count = self._remove_least_recently_used(excess)
                    if not count:
                        raise ValueError(
                            f"{needed} bytes do not fit: shards are limited to {limit} bytes, of which pinned "
                            f"documents and shards being written hold {int(alive + reserved)}; release handles or "
                            "raise `max_bytes`."
                        )
                    evicted, headers = evicted + count, 0
                elif not self._rewrite_most_dead():
                    # all states are alive: what exceeds them is headers, so one more document has to go
                    headers = total - alive - reserved

    def _rewrite_most_dead(self) -> bool:
        dead = {shard: dead for shard, _, dead in self.catalogue.rows(ALIVE) if dead}
        if dead:
            self._rewrite([max(dead, key=dead.__getitem__)])
        return bool(dead)

    def _rewrite(self, shards: Sequence[int]) -> None:
        """Write the live states of `shards` to one new shard, byte for byte, and delete the old ones.

        States whose checksum fails stay where they are, marked as damaged.
        """
        parts, moves, start = [], [], 0
        for number in shards:
            entry = self.catalogue.shard(number)
            places = list(map(Location._make, self.catalogue.rows(STATES, (number,))))
            try:
                shard = MappedShard(self.folder / "shards" / entry[0], *entry[1:])
            except DamagedShardError:
                self.catalogue.mark_damaged(places)
                continue
            intact = shard.fetch(places)
            for place in intact:
                parts.append(shard.context(place))
                moves.append((start, place.state, number))
                start += place.tokens
            if len(intact) < len(places):
                self.catalogue.mark_damaged(place for place in places if place not in intact)
        if parts:
            name = new_shard_name()
            with self.catalogue.writing():
                written = write_shard(self.folder / "shards" / name, parts, self.catalogue.meta["fingerprint"])
                size = sum(part.nbytes for context in parts for part in context.values())
                with self.catalogue.transaction() as connection:
                    number = enter_shard(connection, name, *written, size)
                    # what was removed or encoded anew meanwhile is left alone
                    connection.executemany(
                        "UPDATE states SET shard = ?, start = ? WHERE state = ? AND shard = ?",
                        [(number, *move) for move in moves],
                    )
        self.catalogue.drop_dead_shards()

    def compact(self) -> int:
        """Join shards that are small or hold dead states into full ones; returns the bytes won back."""
        with locked(self.folder / "eviction.lock"):
            self.remove_dead()
            before = self.catalogue.totals()["shard_bytes"]
            group, size = [], 0
            for shard, alive, dead in [*self.catalogue.rows(ALIVE), (None, self.shard_bytes, 1)]:
                if not (dead or 2 * alive < self.shard_bytes):
                    continue
                if group and size + alive > self.shard_bytes:
                    if len(group) > 1 or group[0][1]:
                        self._rewrite([one for one, _ in group])
                    group, size = [], 0
                group.append((shard, dead))
                size += alive
            with self.catalogue.transaction() as connection:
                connection.execute("INSERT INTO words(words) VALUES ('optimize')")
            return before - self.catalogue.totals()["shard_bytes"]
