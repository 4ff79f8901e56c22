"""A folder to a Hub repository: rights, differences, one commit, tag, and read back with digests compared."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

# the client's own name for what its HTTP library raises
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from xcllama.store.manifest import sha256_of

REPO_TYPES = ("model", "dataset", "space", "kernel")
# what a repository may hold that is nobody's work
NEUTRAL = {".gitattributes", "README.md"}


@dataclass(frozen=True)
class Target:
    """Where a folder goes.

    Args:
        marker: a file that every repository of this kind has; one with other files and without it is another's.
        branch: what the commit goes to, made from the main branch where it is not there.
        tag: names the commit for good; a tag is never moved.
        private: of a new repository; an existing one must be private already.
        create_pr: open a pull request instead, without a tag.
        card_on_main: `branch` is one of several versions; the card is also put on main, which the Hub shows.
    """

    repo_id: str
    repo_type: str
    marker: str
    tag: str
    branch: str = "main"
    private: bool = False
    create_pr: bool = False
    card_on_main: bool = False


@dataclass(frozen=True)
class Changes:
    """What a commit would change, and the commit that it was compared with (None: no repository yet)."""

    added: list[str]
    changed: list[str]
    removed: list[str]
    unchanged: list[str]
    parent: str | None
    has_branch: bool
    tagged: str | None

    def lines(self) -> Iterator[str]:
        """One line a file that changes, and a line of counts."""
        for sign, names in (("+", self.added), ("~", self.changed), ("-", self.removed)):
            yield from (f"  {sign} {name}" for name in names)
        counts = [f"{len(getattr(self, kind))} {kind}" for kind in ("added", "changed", "removed", "unchanged")]
        yield "  " + ", ".join(counts)


def files_of(folder: Path) -> list[str]:
    """Names of all files under `folder`."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn what the Hub or the network says into one line; it never holds the token."""
    try:
        yield
    # a large file that could not be sent is a RuntimeError of the client
    except (HTTPError, OSError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = {
            401: "the Hub refuses this token; run `hf auth login` or set HF_TOKEN",
            403: "this token has no right to write there",
            412: "the branch has moved meanwhile; run this again to compare with what is there now",
        }.get(status) or next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{what}: {reason}") from error


def check_rights(api: HfApi, target: Target) -> None:
    """Refuse what cannot be written before anything is sent.

    Raises:
        ValueError: no token, one the Hub refuses, one that only reads, or a namespace that is not its owner's.
    """
    if not (api.token or get_token()):
        raise ValueError("no Hub token: run `hf auth login` or set HF_TOKEN to one that may write.")
    with one_line("cannot tell who you are"):
        account = api.whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"the token of {account['name']} may only read; make one that may write.")
    roles = {organization["name"]: organization.get("roleInOrg") for organization in account.get("orgs", [])}
    namespace = target.repo_id.split("/")[0]
    if target.create_pr or namespace == account["name"] or roles.get(namespace, "read") != "read":
        return
    own = ", ".join([account["name"], *(name for name, role in roles.items() if role != "read")])
    raise ValueError(f"{account['name']} has no right to write to {namespace!r}; namespaces of this token: {own}.")


def compare(api: HfApi, folder: Path, target: Target) -> Changes:
    """What would change in the repository.

    Raises:
        ValueError: the name belongs to something else, the tag exists already, or the Hub cannot be asked.
    """
    local = files_of(folder)
    with one_line(f"cannot compare with {target.repo_id}"):
        for other in REPO_TYPES:
            if other != target.repo_type and api.repo_exists(target.repo_id, repo_type=other):
                raise ValueError(f"{target.repo_id} is the name of a {other} already; choose another name.")
        where = {"repo_id": target.repo_id, "repo_type": target.repo_type}
        try:
            refs = api.list_repo_refs(**where)
        except RepositoryNotFoundError:
            return Changes(local, [], [], [], None, False, None)
        branches = {branch.name: branch.target_commit for branch in refs.branches}
        tags = {tag.name: tag.target_commit for tag in refs.tags}
        parent = branches.get(target.branch) or branches["main"]
        entries = api.list_repo_tree(**where, recursive=True, revision=parent)
        remote = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        private = api.repo_info(**where).private
    if target.marker not in remote and set(remote) - NEUTRAL:
        raise ValueError(f"{target.repo_id} holds something else: it has no {target.marker}; choose another name.")
    if target.private and not private:
        raise ValueError(f"{target.repo_id} is public; make it private in its settings, or leave out --private.")
    same = {name for name in local if name in remote and _is_same(folder / name, remote[name])}
    changes = Changes(
        added=[name for name in local if name not in remote],
        changed=[name for name in local if name in remote and name not in same],
        removed=sorted(set(remote) - set(local) - {".gitattributes"}),
        unchanged=sorted(same),
        parent=parent,
        has_branch=target.branch in branches,
        tagged=tags.get(target.tag),
    )
    is_new = bool(changes.added or changes.changed or changes.removed)
    if changes.tagged and not target.create_pr and (is_new or changes.tagged != parent):
        raise ValueError(f"{target.repo_id} has a tag {target.tag!r} already; give the new version one with --tag.")
    return changes


def _is_same(path: Path, remote: RepoFile) -> bool:
    if remote.size != path.stat().st_size:
        return False
    return sha256_of(path) == remote.lfs.sha256 if remote.lfs else git_hash(path.read_bytes()) == remote.blob_id


def upload(api: HfApi, folder: Path, target: Target, changes: Changes, message: str) -> str:
    """Commit the changes at once, tag the commit, read it back; return its address.

    Large files go first and are no part of the repository until the commit: an upload that is cut off leaves the old
    revision whole, and the next one goes on with the files that are missing.

    Raises:
        ValueError: the Hub refused something, or what was read back differs.
    """
    where = {"repo_id": target.repo_id, "repo_type": target.repo_type}
    with one_line(f"{target.repo_id} was not changed"):
        parent = changes.parent
        if parent is None:
            extra = {"space_sdk": "gradio"} if target.repo_type == "space" else {}
            api.create_repo(**where, private=target.private, **extra)
            parent = api.repo_info(**where).sha
        if not changes.has_branch and target.branch != "main":
            api.create_branch(**where, branch=target.branch, revision=parent)
        commit = parent
        if changes.added or changes.changed or changes.removed:
            names = [*changes.added, *changes.changed]
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
            operations += [CommitOperationDelete(path_in_repo=name) for name in changes.removed]
            # `upload_folder` cuts large folders into several commits: a revision would not appear as a whole
            options = {"revision": target.branch, "parent_commit": parent, "create_pr": target.create_pr}
            info = api.create_commit(**where, operations=operations, commit_message=message, **options)
            commit = info.oid
            if target.create_pr:
                return info.pr_url
    if target.create_pr:
        raise ValueError(f"{target.repo_id} has all of this already: there is nothing to open a pull request for.")
    with one_line(f"{target.repo_id} has the new commit {commit}, but"):
        if target.card_on_main:
            # where it is the same already, the client makes no commit
            card = {"path_or_fileobj": folder / "README.md", "path_in_repo": "README.md", "revision": "main"}
            api.upload_file(**where, **card, commit_message=message)
        if changes.tagged is None:
            api.create_tag(**where, tag=target.tag, revision=commit)
        read_back(api, folder, target, commit)
    prefix = "" if target.repo_type == "model" else f"{target.repo_type}s/"
    return f"{api.endpoint}/{prefix}{target.repo_id}/tree/{target.tag}"


def read_back(api: HfApi, folder: Path, target: Target, commit: str) -> None:
    """Download the commit into an empty cache and compare every file's SHA-256 with the folder's.

    Raises:
        ValueError: a file is missing, too many or different.
    """
    with tempfile.TemporaryDirectory() as empty:
        options = {"repo_type": target.repo_type, "revision": commit, "cache_dir": empty}
        copy = Path(api.snapshot_download(target.repo_id, **options))
        there, here = set(files_of(copy)) - {".gitattributes"}, set(files_of(folder)) - {".gitattributes"}
        differing = sorted(there ^ here) + [name for name in sorted(there & here)
                                            if sha256_of(copy / name) != sha256_of(folder / name)]  # fmt: skip
        if differing:
            raise ValueError(f"{target.repo_id} at {commit} reads back differently: {', '.join(differing[:8])}.")
