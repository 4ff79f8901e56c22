"""What the Hub on loopback keeps: repositories, their refs and commits, over a folder of blobs."""

import datetime
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Entry = dict[str, Any]
Repo = dict[str, Any]


class Store:
    """Repositories: refs, tags and commits (each a whole tree of path -> entry), over a folder of blobs."""

    def __init__(self, root: str | Path, user: str = "tester", token: str | None = None):
        self.root, self.user, self.token = Path(root), user, token
        self.role, self.organizations = "write", []
        # each is called with the handler of a request and returns whether it has answered (or cut off) the request
        self.faults: list[Callable[..., bool]] = []
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        state = self.root / "state.json"
        self.repos: dict[str, Repo] = json.loads(state.read_text()) if state.exists() else {}

    def save(self) -> None:
        partial = self.root / "state.json.partial"
        partial.write_text(json.dumps(self.repos))
        partial.replace(self.root / "state.json")

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.blob(digest).write_bytes(data)
        return digest

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest

    def entry(self, data: bytes) -> Entry:
        object_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"size": len(data), "oid": object_id, "sha256": self.put(data), "lfs": False}

    def create(self, kind: str, repo_id: str, private: bool) -> None:
        repo = {"kind": kind, "id": repo_id, "private": private, "created": now()}
        repo |= {"refs": {}, "tags": {}, "commits": {}, "discussions": 0}
        self.repos[f"{kind}:{repo_id}"] = repo
        self.commit(repo, "main", "initial commit", {".gitattributes": self.entry(b"*.safetensors filter=lfs\n")})

    def commit(self, repo: Repo, branch: str, title: str, tree: dict[str, Entry], message: str = "") -> str:
        parent = repo["refs"].get(branch)
        identity = json.dumps([tree, parent, title, len(repo["commits"])], sort_keys=True)
        sha = hashlib.sha1(identity.encode()).hexdigest()
        commit = {"tree": tree, "parent": parent, "title": title, "message": message, "date": now()}
        repo["commits"][sha], repo["refs"][branch] = commit, sha
        self.save()
        return sha

    def resolve(self, repo: Repo, revision: str) -> str | None:
        revision = unquote(revision)
        for name in (revision, revision.removeprefix("refs/heads/")):
            if found := repo["refs"].get(name) or repo["tags"].get(name):
                return found
        found = [sha for sha in repo["commits"] if len(revision) >= 7 and sha.startswith(revision)]
        return found[0] if len(found) == 1 else None


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def file_entry(path: str, entry: Entry) -> dict[str, Any]:
    described = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
    return described | (lfs_fields(entry) if entry["lfs"] else {})


def lfs_fields(entry: Entry) -> dict[str, Any]:
    digest = entry["sha256"]
    return {"lfs": {"oid": digest, "sha256": digest, "size": entry["size"], "pointerSize": 134}}
