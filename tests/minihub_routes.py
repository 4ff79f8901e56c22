"""The requests that the Hub on loopback answers; see minihub.py."""

import base64
import hashlib
import json
import os
import re
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from minihub_store import Entry, Repo, Store, file_entry, folder_entry, lfs_fields

REPO_TYPES = {"models": "model", "datasets": "dataset", "spaces": "space", "kernels": "kernel"}
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".gguf", ".pt", ".arrow", ".zip", ".npz", ".model")
REPO = r"(?P<kind>models|datasets|spaces|kernels)/(?P<repo_id>[^/]+/[^/]+)"
PREFIX = r"(?:(?P<kind>datasets|spaces|kernels)/)?(?P<repo_id>[^/]+/[^/]+)"
HEADER = re.compile(r"---\s*\n(.*?)\n---", re.S)


class HubError(Exception):
    """An answer with an error status, and the code that the clients turn into an exception."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


ROUTES: list[tuple[str, re.Pattern, Callable[..., None]]] = []


def route(methods: str, pattern: str) -> Callable:
    """Register a method of `Handler` for requests whose path matches `pattern`, named groups as arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append((methods, re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """One request. `store` is set on the subclass that `serve` makes."""

    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.commit_sha = None
        if any(fault(self) for fault in list(self.store.faults)):
            return
        self.body = self.read_body()
        try:
            for methods, pattern, function in ROUTES:
                if self.command in methods.split("|") and (match := pattern.fullmatch(url.path)):
                    arguments = {name: unquote(value) for name, value in match.groupdict().items() if value}
                    with self.store.lock:
                        return function(self, **arguments)
            raise HubError(404, f"no route {self.command} {url.path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            if error.code == "EntryNotFound" and self.commit_sha:
                headers["X-Repo-Commit"] = self.commit_sha
            self.send({"error": str(error)}, error.status, headers)
        except Exception as error:
            traceback.print_exc()
            self.send({"error": repr(error)}, 500)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def send(self, data: Any = b"", status: int = 200, headers: dict[str, str] | None = None, kind: str = "json"):
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
        self.send_response(status)
        sent = {"Content-Type": f"application/{kind}", "Content-Length": str(len(data))} | (headers or {})
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def authorized(self) -> bool:
        sent = self.headers.get("Authorization", "")
        return sent == f"Bearer {self.store.token}" if self.store.token else sent.startswith("Bearer ")

    def authorize(self) -> None:
        if not self.authorized():
            raise HubError(401, "Invalid username or password.")

    def repo(self, kind: str, repo_id: str) -> Repo:
        repo = self.store.repos.get(f"{REPO_TYPES.get(kind, kind)}:{repo_id}")
        if repo is None or (repo["private"] and not self.authorized()):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def tree(self, repo: Repo, revision: str) -> dict[str, Entry]:
        self.commit_sha = self.store.resolve(repo, revision)
        if self.commit_sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo["commits"][self.commit_sha]["tree"]

    def text(self, entry: Entry) -> str:
        return self.store.blob(entry["sha256"]).read_text(errors="replace")

    def body_repo_id(self) -> str:
        return f"{self.json().get('organization') or self.store.user}/{self.json()['name']}"

    # account and repositories

    @route("GET", r"/api/whoami-v2")
    def whoami(self) -> None:
        self.authorize()
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.store.role}}
        account = {"type": "user", "id": "1", "name": self.store.user, "orgs": self.store.organizations}
        self.send(account | {"auth": token})

    @route("POST", r"/api/repos/create")
    def create_repo(self) -> None:
        self.authorize()
        kind, repo_id, asked = self.json().get("type") or "model", self.body_repo_id(), self.json()
        answer = {
            "url": f"{self.base()}/{'' if kind == 'model' else kind + 's/'}{repo_id}",
            "name": repo_id,
            "id": repo_id,
        }
        if f"{kind}:{repo_id}" in self.store.repos:
            return self.send(answer | {"error": "You already created this repo"}, 409)
        self.store.create(kind, repo_id, asked.get("visibility") == "private" or bool(asked.get("private")))
        self.send(answer)

    @route("DELETE", r"/api/repos/delete")
    def delete_repo(self) -> None:
        self.authorize()
        if self.store.repos.pop(f"{self.json().get('type') or 'model'}:{self.body_repo_id()}", None) is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        self.store.save()
        self.send({})

    @route("PUT", rf"/api/{REPO}/settings")
    def settings(self, kind: str, repo_id: str) -> None:
        self.authorize()
        asked = self.json()
        if "visibility" in asked or "private" in asked:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.repo(kind, repo_id)["private"] = private
        self.store.save()
        self.send({})

    @route("GET", rf"/api/{REPO}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, kind: str, repo_id: str, revision: str = "main") -> None:
        repo = self.repo(kind, repo_id)
        tree = self.tree(repo, revision)
        header = HEADER.match(self.text(tree["README.md"])) if "README.md" in tree else None
        # dates in a card are no JSON
        card = json.loads(json.dumps(yaml.safe_load(header[1]) or {}, default=str)) if header else {}
        siblings = [{"rfilename": path} for path in sorted(tree)]
        if self.query.get("blobs"):
            for sibling in siblings:
                entry = tree[sibling["rfilename"]]
                sibling |= {"size": entry["size"], "blobId": entry["oid"]} | (
                    lfs_fields(entry) if entry["lfs"] else {}
                )
        answer = {"_id": "0", "id": repo_id, "author": repo_id.split("/")[0], "sha": self.commit_sha}
        answer |= {"lastModified": repo["commits"][self.commit_sha]["date"], "createdAt": repo["created"]}
        answer |= {"private": repo["private"], "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        answer |= {"tags": card.get("tags") or [], "cardData": card, "siblings": siblings}
        if kind == "models":
            names = {"pipeline_tag": card.get("pipeline_tag"), "library_name": card.get("library_name")}
            answer |= {"modelId": repo_id} | names
            answer["config"] = json.loads(self.text(tree["config.json"])) if "config.json" in tree else None
        if kind == "spaces":
            hardware = {"current": "cpu-basic", "requested": "cpu-basic"}
            runtime = {"stage": "RUNNING", "hardware": hardware, "resources": {}}
            answer |= {"sdk": card.get("sdk"), "runtime": runtime}
        self.send(answer)

    @route("GET", r"/api/(?P<kind>models|datasets|spaces|kernels)")
    def listing(self, kind: str) -> None:
        author, search = self.query.get("author"), self.query.get("search", "").lower()
        found = [
            {"_id": "0", "id": repo["id"], "private": False, "tags": [], "downloads": 0, "likes": 0}
            for repo in self.store.repos.values()
            if repo["kind"] == REPO_TYPES[kind] and not repo["private"]
            and author in (None, repo["id"].split("/")[0]) and search in repo["id"].lower()
        ]  # fmt: skip
        self.send(found)

    # trees, refs and history

    @route("GET", rf"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
    def list_tree(self, kind: str, repo_id: str, revision: str, path: str = "") -> None:
        tree = self.tree(self.repo(kind, repo_id), revision)
        start = path.strip("/") + "/" if path.strip("/") else ""
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        files, folders = [], {}
        for name, entry in sorted(tree.items()):
            if name.startswith(start):
                parts = name[len(start) :].split("/")
                for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                    folders[start + "/".join(parts[:depth])] = True
                if recursive or len(parts) == 1:
                    files.append(file_entry(name, entry))
        if start and not files and not folders:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        self.send([folder_entry(folder) for folder in folders] + files)

    @route("POST", rf"/api/{REPO}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        tree, found = self.tree(self.repo(kind, repo_id), revision), []
        is_json = "json" in self.headers.get("Content-Type", "")
        for path in self.json()["paths"] if is_json else parse_qs(self.body.decode()).get("paths", []):
            path = path.strip("/")
            if path in tree:
                found.append(file_entry(path, tree[path]))
            elif any(name.startswith(path + "/") for name in tree):
                found.append(folder_entry(path))
        self.send(found)

    @route("GET", rf"/api/{REPO}/refs")
    def refs(self, kind: str, repo_id: str) -> None:
        repo, kinds = self.repo(kind, repo_id), {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for name, sha in repo["refs"].items():
            if name.startswith("refs/pr/"):
                kinds["pullRequests"].append({"name": name, "ref": name, "targetCommit": sha})
            else:
                kinds["branches"].append({"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha})
        for name, sha in repo["tags"].items():
            kinds["tags"].append({"name": name, "ref": f"refs/tags/{name}", "targetCommit": sha})
        self.send(kinds)

    @route("GET", rf"/api/{REPO}/commits/(?P<revision>[^/]+)")
    def commits(self, kind: str, repo_id: str, revision: str) -> None:
        repo, found = self.repo(kind, repo_id), []
        self.tree(repo, revision)
        sha = self.commit_sha if int(self.query.get("p", 0)) == 0 else None
        while sha:
            commit = repo["commits"][sha]
            described = {name: commit[name] for name in ("title", "message", "date")}
            found.append({"id": sha, "authors": [{"user": self.store.user}]} | described)
            sha = commit["parent"]
        self.send(found)

    @route("POST|DELETE", rf"/api/{REPO}/(?P<what>branch|tag)/(?P<name>.+)")
    def change_ref(self, kind: str, repo_id: str, what: str, name: str) -> None:
        self.authorize()
        repo = self.repo(kind, repo_id)
        refs = repo["refs"] if what == "branch" else repo["tags"]
        if self.command == "DELETE":
            if refs.pop(name, None) is None:
                raise HubError(404, f"no {what} {name}", "RevisionNotFound")
        else:
            # a tag is named in the body, and its path names what it points to
            target = name if what == "tag" else self.json().get("startingPoint") or "main"
            new = self.json()["tag"] if what == "tag" else name
            if new in refs:
                raise HubError(409, f"Reference already exists: {new}")
            self.tree(repo, target)
            refs[new] = self.commit_sha
        self.store.save()
        self.send({})

    # uploads

    @route("POST", r"/api/validate-yaml")
    def validate_yaml(self) -> None:
        header, warnings = HEADER.match(self.json()["content"]), []
        if header is None:
            warnings = [{"message": "empty or missing yaml metadata in repo card"}]
        elif not isinstance(yaml.safe_load(header[1]), dict):
            return self.send({"errors": [{"message": "the metadata must be a mapping"}], "warnings": []}, 400)
        self.send({"errors": [], "warnings": warnings})

    @route("POST", rf"/api/{REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        self.authorize()
        tree, files = self.tree(self.repo(kind, repo_id), revision), []
        for file in self.json()["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            entry = tree.get(file["path"])
            object_id = entry and (entry["sha256"] if entry["lfs"] else entry["oid"])
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": object_id})
        self.send({"files": files})

    @route("POST", rf"/{PREFIX}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str, kind: str = "models") -> None:
        self.authorize()
        objects = []
        for wanted in self.json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.store.blob(wanted["oid"]).exists():
                url = f"{self.base()}/_lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append(answer)
        self.send({"transfer": "basic", "objects": objects}, kind="vnd.git-lfs+json")

    @route("PUT", r"/_lfs/(?P<digest>[0-9a-f]{64})")
    def lfs_upload(self, digest: str) -> None:
        if self.store.put(self.body) != digest:
            raise HubError(400, "sha256 mismatch")
        self.send({})

    @route("POST", r"/_lfs/(?P<digest>[0-9a-f]{64})/verify")
    def lfs_verify(self, digest: str) -> None:
        self.send({}, 200 if self.store.blob(digest).exists() else 404)

    @route("POST", rf"/api/{REPO}/commit/(?P<revision>[^/]+)")
    def make_commit(self, kind: str, repo_id: str, revision: str) -> None:
        self.authorize()
        repo = self.repo(kind, repo_id)
        tree, parent, header = dict(self.tree(repo, revision)), self.commit_sha, {}
        for line in filter(bytes.strip, self.body.splitlines()):
            operation = json.loads(line)
            if operation["key"] == "header":
                header = operation["value"]
            else:
                self.apply(tree, operation["key"], operation["value"])
        if header.get("parentCommit") not in (None, parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        branch, request_url = revision.removeprefix("refs/heads/"), None
        if self.query.get("create_pr"):
            repo["discussions"] += 1
            branch = f"refs/pr/{repo['discussions']}"
            repo["refs"][branch] = parent
            request_url = f"{self.base()}/{repo_id}/discussions/{repo['discussions']}"
        sha = self.store.commit(repo, branch, header.get("summary", ""), tree, header.get("description", ""))
        prefix = "" if kind == "models" else f"{kind}/"
        url = f"{self.base()}/{prefix}{repo_id}/commit/{sha}"
        self.send(
            {"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": request_url, "hookOutput": ""}
        )

    def apply(self, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        """One operation of a commit, on `tree` in place."""
        if key == "file":
            content = value["content"].encode()
            tree[value["path"]] = self.store.entry(base64.b64decode(content) if value.get("encoding") else content)
        elif key == "lfsFile":
            blob = self.store.blob(value["oid"])
            if not blob.exists():
                raise HubError(400, f"lfs object {value['oid']} was not uploaded")
            object_id = hashlib.sha1(value["oid"].encode()).hexdigest()
            lfs = {"size": blob.stat().st_size, "oid": object_id, "sha256": value["oid"], "lfs": True}
            tree[value["path"]] = lfs
        elif key == "deletedFile":
            if tree.pop(value["path"], None) is None:
                raise HubError(404, value["path"], "EntryNotFound")
        elif key == "deletedFolder":
            for path in [path for path in tree if path.startswith(value["path"].strip("/") + "/")]:
                del tree[path]
        else:
            raise HubError(400, f"unknown operation {key}")

    # downloads

    @route("GET|HEAD", rf"/{PREFIX}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def download(self, repo_id: str, revision: str, path: str, kind: str = "models") -> None:
        tree = self.tree(self.repo(kind, repo_id), revision)
        if path not in tree:
            raise HubError(404, "Entry not found", "EntryNotFound")
        entry, size = tree[path], tree[path]["size"]
        tag = f'"{entry["sha256"] if entry["lfs"] else entry["oid"]}"'
        headers = {"X-Repo-Commit": self.commit_sha, "ETag": tag, "Accept-Ranges": "bytes"}
        headers["Content-Disposition"] = f'inline; filename="{os.path.basename(path)}"'
        if entry["lfs"]:
            headers |= {"X-Linked-Etag": tag, "X-Linked-Size": str(size)}
        first, last, status = 0, size - 1, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last, status = int(asked[1]), min(int(asked[2] or size - 1), size - 1), 206
            if first >= size:
                return self.send(b"", 416, {"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        if self.command == "HEAD":
            return self.send(b"", 200, headers | {"Content-Length": str(size)}, "octet-stream")
        with open(self.store.blob(entry["sha256"]), "rb") as blob:
            blob.seek(first)
            self.send(blob.read(last - first + 1), status, headers, "octet-stream")
