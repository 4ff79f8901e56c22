"""Snapshots: a namespace published as shards, a Parquet catalogue, a card and a manifest; and brought back."""

import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from tqdm import tqdm

from .catalogue import Catalogue
from .manifest import MANIFEST_NAME, Folder, Manifest, ShardEntry, sha256_of, write_part
from .shards import DamagedShardError, MappedShard, offsets_of, slices, write_shard

CARD_TEMPLATE = files("xcllama.templates") / "context_card.md.jinja"
SNAPSHOT_QUERY = (
    "SELECT id, text, metadata, content_hash, start, tokens, nbytes, checksum FROM documents "
    "JOIN texts USING (document) WHERE shard = ? AND expires > unixepoch() ORDER BY start"
)
FIELDS = ("id", "text", "metadata", "content_hash", "start", "tokens", "nbytes", "checksum")


def write_card(folder: Folder, manifest: Manifest, title: str, license_id: str, repo_id: str | None = None) -> None:
    """Write the snapshot's README.md; `repo_id`: where on the Hub it will be published from this folder."""
    from jinja2 import StrictUndefined, Template

    values = {
        "title": title,
        "license": license_id,
        "url": folder.url if repo_id is None else f"hf://datasets/{repo_id}",
        "repo_id": repo_id or folder.url.removeprefix("hf://datasets/"),
        "nbytes": manifest.nbytes,
        "num_shards": len(manifest.shards),
        "bytes_per_token": round(manifest.nbytes / max(manifest.tokens, 1), 1),
    }
    fields = ("documents", "tokens", "dtype", "model", "fingerprint", "template_version")
    values |= {name: getattr(manifest, name) for name in fields}
    template = Template(CARD_TEMPLATE.read_text(), undefined=StrictUndefined, keep_trailing_newline=True)
    folder.write("README.md", template.render(values).encode())


def commit_manifest(folder: Folder, manifest: Manifest, title: str = "Encoded contexts", license_id: str = "other"):
    """Make a snapshot of what is in `folder`: card first, manifest last."""
    write_card(folder, manifest, title, license_id)
    folder.write(MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def write_snapshot(
    catalogue: Catalogue,
    shards: Path,
    url: str | Path,
    *,
    overwrite: bool = False,
    title: str = "Encoded contexts",
    license_id: str = "other",
    storage_options: dict | None = None,
) -> Manifest:
    """Publish the live documents of a catalogue; damaged ones are refused.

    Args:
        catalogue, shards: of a store.
        url: local path or fsspec URL.
        overwrite: replace a snapshot that is there (its files of other names stay).

    Raises:
        ValueError: damaged documents, a snapshot that is there, or a shard that went away meanwhile.
    """
    folder = Folder(url, storage_options)
    if folder.exists(MANIFEST_NAME) and not overwrite:
        raise ValueError(f"there is a snapshot at {folder.url}; pass `overwrite=True` to replace it.")
    if damaged := catalogue.damaged():
        raise ValueError(f"damaged documents are not published: {', '.join(map(repr, damaged[:8]))}; repair them.")
    entries, parts, tokens = [], [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for number, shard in enumerate(tqdm(catalogue.live_shards(), unit="shard", disable=None)):
            rows = [dict(zip(FIELDS, row, strict=True)) for row in catalogue.rows(SNAPSHOT_QUERY, (shard,))]
            entry = catalogue.shard(shard)
            if not rows or entry is None:
                continue
            path = _live_part(shards / entry[0], entry, rows, catalogue, Path(scratch))
            header = MappedShard.header_checksum(path)
            name = f"shards/{entry[0]}"
            entries.append(ShardEntry(name, path.stat().st_size, sha256_of(path), header.hex()))
            folder.upload(path, name)
            parts.append(write_part(folder, number, [row | {"shard": name} for row in rows]))
            tokens += sum(row["tokens"] for row in rows)
    meta = catalogue.meta
    manifest = Manifest(
        **{name: meta[name] for name in ("fingerprint", "dtype", "template_version", "namespace")},
        model=meta.get("model", ""),
        documents=sum(part.documents for part in parts),
        tokens=tokens,
        shards=entries,
        catalogue=parts,
    )
    return commit_manifest(folder, manifest, title, license_id)


def _live_part(path: Path, entry: tuple, rows: list[dict], catalogue: Catalogue, scratch: Path) -> Path:
    """The shard itself if all of it is alive, else a copy of what is; every document's checksum is compared."""
    try:
        shard = MappedShard(path, *entry[1:])
    except DamagedShardError as error:
        raise ValueError(f"{error} Run `verify(repair=True)`, or try again if the store was changing.") from error
    for row in rows:
        if not shard.verify(row["start"], row["tokens"], row["checksum"]):
            raise ValueError(f"the states of {row['id']!r} are damaged; run `verify(repair=True)`.")
    total = shard.parts["token_ids"].shape[0]
    if sum(row["tokens"] for row in rows) == total:
        return path
    offsets = offsets_of(row["tokens"] for row in rows)
    spans = [(shard, row["start"], row["tokens"]) for row in rows]
    for row, start in zip(rows, offsets, strict=False):
        row["start"] = start
    write_shard(scratch / path.name, slices(spans), catalogue.meta["fingerprint"])
    return scratch / path.name


def pull(url: str, folder: str | Path, storage_options: dict | None = None, progress: Callable = tqdm) -> Manifest:
    """Copy a snapshot to a local folder; what is there already and has the right SHA-256 is kept.

    Raises:
        ValueError: no snapshot, or a file whose SHA-256 is not what the manifest says.
    """
    source, target = Folder(url, storage_options), Path(folder)
    manifest = read_manifest(source)
    for entry in progress([*manifest.shards, *manifest.catalogue], unit="file", disable=None):
        path = target / entry.name
        if path.is_file() and path.stat().st_size == entry.nbytes and sha256_of(path) == entry.sha256:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            partial = Path(scratch, "file")
            source.fs.get_file(source.path(entry.name), str(partial))
            if sha256_of(partial) != entry.sha256:
                raise ValueError(f"{source.url}/{entry.name} has another SHA-256 than its manifest says.")
            Folder(target).upload(partial, entry.name)
    for name in ("README.md", MANIFEST_NAME):
        if source.exists(name):
            Folder(target).write(name, source.read(name))
    return manifest


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a snapshot.

    Raises:
        ValueError: no snapshot, or one of a newer format.
    """
    try:
        return Manifest.from_json(folder.read(MANIFEST_NAME), folder.url)
    except FileNotFoundError as error:
        raise ValueError(f"no snapshot at {folder.url}: it has no {MANIFEST_NAME}.") from error
