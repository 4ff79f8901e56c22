"""A bounded size on disk: what is removed, in which order, and how the room that dead documents leave is won back.

The bound counts shard files. Shards are at most an eighth of it, and an eighth is kept free, so that a shard can be
written anew without its dead documents before the old one goes: the bound holds at every moment.
"""

import fcntl
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .catalogue import Catalogue
from .shards import DamagedShardError, MappedShard, offsets_of, slices, write_shard

SHARD_SUFFIX = ".safetensors"


def new_shard_name() -> str:
    """A file name no other writer uses."""
    return secrets.token_hex(12) + SHARD_SUFFIX


@contextmanager
def writing(folder: Path, exclusive: bool = False) -> Iterator[bool]:
    """Hold the writers' lock: shared from a shard's first byte to its commit, exclusive (no wait) to clean up.

    Yields:
        Whether the lock was got.
    """
    with open(folder / "writers.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except BlockingIOError:
            yield False
        else:
            yield True


def clean(catalogue: Catalogue, folder: Path) -> int:
    """Delete what killed writers left: files that no shard names, room that they had reserved.

    Returns:
        Files deleted; 0 too while another writer is at work.
    """
    with writing(folder, exclusive=True) as alone:
        if not alone:
            return 0
        with catalogue.transaction() as connection:
            connection.execute("DELETE FROM shards WHERE state = 'reserved'")
            known = {row[0] for row in connection.execute("SELECT name FROM shards")}
        litter = [path for path in (folder / "shards").iterdir() if path.name not in known]
        for path in litter:
            path.unlink(missing_ok=True)
        return len(litter)


def drop_dead_shards(catalogue: Catalogue, folder: Path) -> int:
    """Delete shards without a document; returns how many."""
    with catalogue.transaction() as connection:
        dead = connection.execute(
            "DELETE FROM shards WHERE state = 'live' AND NOT EXISTS "
            "(SELECT 1 FROM documents WHERE documents.shard = shards.shard) RETURNING name"
        ).fetchall()
    # after the commit: whoever still finds the file listed can open it
    for (name,) in dead:
        (folder / "shards" / name).unlink(missing_ok=True)
    return len(dead)


def remove_expired(catalogue: Catalogue) -> int:
    """Delete documents and pins whose time is over; returns how many documents."""
    now = time.time()
    with catalogue.transaction() as connection:
        connection.execute("DELETE FROM pins WHERE expires <= ?", (now,))
        ids = [row[0] for row in connection.execute("SELECT id FROM documents WHERE expires <= ?", (now,))]
        if ids:
            catalogue.remove(connection, ids, catalogue.next_version(connection))
    return len(ids)


def remove_least_recently_used(catalogue: Catalogue, nbytes: int) -> int:
    """Delete unpinned documents, the least recently used first, worth `nbytes` of states; returns how many."""
    ids, freed = [], 0
    with catalogue.transaction() as connection:
        rows = connection.execute(
            "SELECT id, nbytes FROM documents WHERE NOT EXISTS "
            "(SELECT 1 FROM pins WHERE pins.id = documents.id AND pins.expires > ?) ORDER BY last_used, document",
            (time.time(),),
        )
        for document_id, size in rows:
            if freed >= nbytes:
                break
            ids.append(document_id)
            freed += size
        if ids:
            catalogue.remove(connection, ids, catalogue.next_version(connection))
    return len(ids)


@contextmanager
def evicting(folder: Path) -> Iterator[None]:
    """Hold the lock of evictions and rewrites: one process and thread at a time."""
    with open(folder / "eviction.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_room(catalogue: Catalogue, folder: Path, needed: int, limit: int, name: str | None = None) -> int:
    """Evict until `needed` more bytes of shards fit below `limit`, and reserve them for the shard `name`.

    Returns:
        Documents evicted.

    Raises:
        ValueError: it does not fit even when all that may go is gone.
    """
    evicted, headers = 0, 0
    with evicting(folder):
        while True:
            evicted += remove_expired(catalogue)
            drop_dead_shards(catalogue, folder)
            with catalogue.transaction() as connection:
                total, reserved = connection.execute(
                    "SELECT TOTAL(nbytes), TOTAL(nbytes * (state = 'reserved')) FROM shards"
                ).fetchone()
                alive = connection.execute("SELECT TOTAL(nbytes) FROM documents").fetchone()[0]
                if total + needed <= limit:
                    if name is not None:
                        connection.execute(
                            "INSERT INTO shards(name, nbytes, state) VALUES (?, ?, 'reserved')", (name, needed)
                        )
                    return evicted
            excess = int(alive + reserved + needed + headers - limit)
            if excess > 0:
                count = remove_least_recently_used(catalogue, excess)
                if not count:
                    raise ValueError(
                        f"{needed} bytes do not fit: shards are limited to {limit} bytes, of which pinned documents "
                        f"and shards being written hold {int(alive + reserved)}; release handles or raise `max_bytes`."
                    )
                evicted, headers = evicted + count, 0
            elif not rewrite(catalogue, folder, most_dead(catalogue)):
                # all documents are alive: what exceeds them is headers, so one more has to go
                headers = int(total - alive - reserved)


def most_dead(catalogue: Catalogue) -> list[int]:
    """The shard with the most bytes of dead documents, if any has some."""
    with catalogue.transaction() as connection:
        rows = connection.execute(
            "SELECT shards.shard FROM shards JOIN documents ON documents.shard = shards.shard "
            "WHERE shards.state = 'live' GROUP BY shards.shard "
            "HAVING shards.document_bytes > SUM(documents.nbytes) AND NOT SUM(documents.damaged) "
            "ORDER BY shards.document_bytes - SUM(documents.nbytes) DESC LIMIT 1"
        ).fetchall()
    return [row[0] for row in rows]


def rewrite(catalogue: Catalogue, folder: Path, shards: list[int]) -> bool:
    """Write the live documents of `shards` to one new shard, byte for byte, and delete the old ones.

    Documents whose checksum fails stay where they are, marked as damaged.

    Returns:
        Whether there was something to do.
    """
    spans, moved = [], []
    for shard in shards:
        entry, documents = catalogue.shard(shard), catalogue.documents_of(shard)
        if entry is None:
            continue
        try:
            mapped = MappedShard(folder / "shards" / entry[0], *entry[1:])
        except DamagedShardError:
            catalogue.mark_damaged([document.id for document in documents])
            continue
        for document in documents:
            mapped.prefetch(document.start, document.tokens)
            if mapped.document_checksum(document.start, document.tokens) == document.checksum:
                spans.append((mapped, document.start, document.tokens))
                moved.append((document.number, shard))
            else:
                catalogue.mark_damaged([document.id])
    if spans:
        offsets = offsets_of(tokens for _, _, tokens in spans)
        name = new_shard_name()
        with writing(folder):
            nbytes, header_checksum = write_shard(
                folder / "shards" / name, slices(spans), catalogue.meta["fingerprint"]
            )
            catalogue.move(name, nbytes, header_checksum, zip(moved, offsets, strict=False))
    drop_dead_shards(catalogue, folder)
    return bool(shards)


def compact(catalogue: Catalogue, folder: Path, shard_bytes: int) -> int:
    """Join shards that are small or hold dead documents into full ones; returns the bytes won back."""
    with evicting(folder):
        remove_expired(catalogue)
        drop_dead_shards(catalogue, folder)
        before = catalogue.totals()["shard_bytes"]
        with catalogue.transaction() as connection:
            rows = connection.execute(
                "SELECT shards.shard, SUM(documents.nbytes) AS alive, shards.document_bytes FROM shards "
                "JOIN documents ON documents.shard = shards.shard WHERE shards.state = 'live' GROUP BY shards.shard "
                "HAVING shards.document_bytes > alive OR 2 * alive < ? ORDER BY shards.shard",
                (shard_bytes,),
            ).fetchall()
        group, size = [], 0
        for shard, alive, whole in [*rows, (None, shard_bytes, 0)]:
            if group and size + alive > shard_bytes:
                if len(group) > 1 or group[0][1] < group[0][2]:
                    rewrite(catalogue, folder, [entry[0] for entry in group])
                group, size = [], 0
            group.append((shard, alive, whole))
            size += alive
        catalogue.optimize()
        return before - catalogue.totals()["shard_bytes"]
