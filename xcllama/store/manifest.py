"""The form of a snapshot: a namespace as a folder on any file system.

A snapshot is `manifest.json` (written last: a folder without it is no snapshot), `README.md` (card),
`catalogue/*.parquet` (a row a document: id, text, metadata, its passages and where their states lie) and
`shards/*.safetensors`. The manifest names every file with its SHA-256; nothing that it says is trusted.
"""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import fsspec
import pyarrow
import pyarrow.parquet
from fsspec import AbstractFileSystem

from xcllama.durable import durable

FORMAT, FORMAT_VERSION = "xcllama-context-snapshot", 2
MANIFEST_NAME = "manifest.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# no name that a manifest gives leaves its folder
FILE_NAMES = {
    "shards": r"shards/[a-zA-Z0-9][\w.-]*\.safetensors",
    "catalogue": r"catalogue/[a-zA-Z0-9][\w.-]*\.parquet",
}
TEXTS = [(name, pyarrow.string()) for name in ("id", "text", "metadata", "digest")]
PASSAGE = [
    ("start", pyarrow.int64()),
    ("stop", pyarrow.int64()),
    ("content", pyarrow.binary(16)),
    ("shard", pyarrow.string()),
    ("first", pyarrow.int64()),
    ("tokens", pyarrow.int64()),
    ("nbytes", pyarrow.int64()),
    ("checksum", pyarrow.binary(16)),
]
PART_SCHEMA = pyarrow.schema([*TEXTS, ("passages", pyarrow.list_(pyarrow.struct(PASSAGE)))])


@dataclass(frozen=True)
class FileEntry:
    """A file of a snapshot; of a shard also the checksum of its header (hexadecimal)."""

    name: str
    nbytes: int
    sha256: str
    header_checksum: str = ""

    @property
    def file_name(self) -> str:
        """The name without its folder."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class Manifest:
    """What a snapshot holds and what made it; `kind`: of its states (`shards.describe`)."""

    fingerprint: str
    kind: str
    dtype: str
    template_version: str
    namespace: str
    model: str
    documents: int
    tokens: int
    shards: list[FileEntry]
    catalogue: list[FileEntry]
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def files(self) -> list[FileEntry]:
        """Shards and parts of the catalogue."""
        return [*self.shards, *self.catalogue]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    def to_json(self) -> str:
        """The manifest as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Parse a manifest.

        Raises:
            ValueError: no manifest, one of another format, or one that names files elsewhere.
        """
        try:
            found = json.loads(text)
            if found.get("format") != FORMAT or found["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"its format is {found.get('format')!r} version {found.get('format_version')!r}, this code reads "
                    f"{FORMAT!r} version {FORMAT_VERSION}"
                )
            for kind, pattern in FILE_NAMES.items():
                found[kind] = [_strict(FileEntry, entry) for entry in found[kind]]
                names = [entry.name for entry in found[kind]]
                if len(set(names)) < len(names) or not all(re.fullmatch(pattern, name, re.ASCII) for name in names):
                    raise ValueError(f"its {kind} are named {names!r:.200}")
            return _strict(cls, found)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{where} is no snapshot's manifest: {error}.") from error


def _strict(kind: type, values: dict):
    """An instance of a data class whose strings are strings and whose counts are counts."""
    made = kind(**values)
    for item in fields(kind):
        value = getattr(made, item.name)
        if item.type in (str, int) and type(value) is not item.type or item.type is int and value < 0:
            raise ValueError(f"{item.name} is {value!r:.80}")
    return made


class Folder:
    """A folder on any fsspec file system; files appear in it whole or not at all.

    Args:
        url: a local path, or an fsspec URL: "s3://bucket/folder", "hf://datasets/org/name", ...
        storage_options: of the file system; None: `FSSPEC_...` variables and its own defaults.
    """

    def __init__(self, url: str | Path, storage_options: dict | None = None):
        self.url = str(url).rstrip("/") or "/"
        self.fs: AbstractFileSystem
        self.fs, root = fsspec.core.url_to_fs(self.url, **(storage_options or {}))
        self.root = root.rstrip("/")
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def path(self, name: str) -> str:
        """A file of the folder, for `fs`."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file is there, now (listings are not cached)."""
        self.fs.invalidate_cache()
        return self.fs.exists(self.path(name))

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: it is not there.
        """
        return self.fs.cat_file(self.path(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        if not self.is_local:
            self.fs.pipe_file(self.path(name), content)
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with durable(target) as file:
            file.write(content)

    def upload(self, local: Path, name: str) -> None:
        """Copy a complete local file here under its name."""
        if not self.is_local:
            self.fs.put_file(str(local), self.path(name))
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(local, "rb") as source, durable(target) as file:
            shutil.copyfileobj(source, file, 1 << 22)

    def manifest(self) -> Manifest:
        """The manifest of a snapshot.

        Raises:
            ValueError: no snapshot, or one of another format.
        """
        try:
            return Manifest.from_json(self.read(MANIFEST_NAME), self.url)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"no snapshot at {self.url}: it has no {MANIFEST_NAME}.") from error

    def commit(self, manifest: Manifest, card: bytes) -> Manifest:
        """Make a snapshot of what is here: card first, manifest last; then what it replaces goes."""
        old = self.manifest().files if self.exists(MANIFEST_NAME) else []
        self.write("README.md", card)
        self.write(MANIFEST_NAME, manifest.to_json().encode())
        for name in {entry.name for entry in old} - {entry.name for entry in manifest.files}:
            self.fs.rm_file(self.path(name))
        return manifest


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_snapshot(path: str | Path) -> bool:
    """Whether `path` is a URL, a folder with a manifest, or, where there is no such folder, a data set's id."""
    here = Path(path)
    if "://" in str(path) or here.exists():
        return "://" in str(path) or (here / MANIFEST_NAME).is_file()
    return bool(HUB_ID.fullmatch(str(path)))


def resolve(path: str | Path, revision: str | None = None) -> str:
    """Where a snapshot is: a folder or URL as it is, a data set's id ("org/name") as its URL on the Hub.

    On the Hub the commit is fixed, so that all files are of one, whatever moves meanwhile.

    Raises:
        ValueError: a revision of something that is not on the Hub.
    """
    url = str(path)
    if not Path(url).exists() and HUB_ID.fullmatch(url):
        url = f"hf://datasets/{url}"
    if not url.startswith("hf://"):
        if revision is not None:
            raise ValueError(f"`revision` is for a repository on the Hub, got {revision!r} for {url}.")
        return url
    from huggingface_hub import HfApi, HfFileSystem

    place = HfFileSystem().resolve_path(url, revision=revision)
    commit = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha
    kind = "" if place.repo_type == "model" else f"{place.repo_type}s/"
    return f"hf://{kind}{place.repo_id}@{quote(commit, safe='')}/{place.path_in_repo}"


def write_part(folder: Folder, rows: Sequence[dict], name: str | None = None, notes: dict | None = None) -> FileEntry:
    """Write a Parquet part of a catalogue.

    Args:
        rows: documents with their passages (`PART_SCHEMA`).
        name: of the file; None: after its content.
        notes: go into the file's own metadata.
    """
    table = pyarrow.Table.from_pylist(list(rows), PART_SCHEMA).replace_schema_metadata(notes)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    name = f"catalogue/{name or digest[:24]}.parquet"
    folder.write(name, buffer.getvalue())
    return FileEntry(name, len(buffer.getvalue()), digest)


def render_card(manifest: Manifest, url: str, title: str = "Encoded contexts", license_id: str = "other") -> bytes:
    """The README.md of a snapshot at `url`."""
    from jinja2 import StrictUndefined, Template

    names = ("documents", "tokens", "dtype", "model", "fingerprint", "template_version", "nbytes")
    values = {name: getattr(manifest, name) for name in names}
    values |= {"title": title, "license": license_id, "url": url, "num_shards": len(manifest.shards)}
    values["bytes_per_token"] = round(manifest.nbytes / max(manifest.tokens, 1), 1)
    template = (files("xcllama.templates") / "context_card.md.jinja").read_text()
    return Template(template, undefined=StrictUndefined, keep_trailing_newline=True).render(values).encode()
