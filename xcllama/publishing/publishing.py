"""What is published, and in which order: assemble and check everything, compare everything, and only then upload."""

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from xcllama.provenance import ROOT
from xcllama.publishing import assembling
from xcllama.publishing.model_card import DEFAULT, is_adapter
from xcllama.publishing.uploading import Changes, Target, check_rights, compare, files_of, upload

# repository type on the Hub, and the file that every repository of the kind has; a model may turn out to be an adapter
KINDS = {
    "model": ("model", "config.json"),
    "adapter": ("model", "adapter_config.json"),
    "kernel": ("kernel", "build.toml"),
    "dataset": ("dataset", "build.json"),
    "context": ("dataset", "manifest.json"),
    "space": ("space", "app.py"),
}
NAMES = {
    "kernel": "xcllama-kernels",
    "dataset": "xcllama-mix",
    "context": "xcllama-passages",
    "space": "xcllama-demo",
}
CHECKPOINT = ROOT / "checkpoints" / DEFAULT


@dataclass(frozen=True)
class Release:
    """What to publish and how.

    Args:
        kind: "model" (adapters are models, too), a key of `NAMES`, or "all".
        namespace: owner of the repositories; names are the checkpoints' and `NAMES`.
        repo_id: of the one repository, in place of the namespace.
        checkpoint: of the model, and what encodes the corpus and answers in the Space; None: all of checkpoints/, and
            `CHECKPOINT`.
        base, original: of a model, see `assemble_model`.
        build: of the data set, see `assemble_dataset`.
        corpus: passages or store of the context cache, see `assemble_context`.
        branch: of the commit; None: main, or the kernel's version branch.
    """

    kind: str
    namespace: str
    tag: str
    repo_id: str | None = None
    checkpoint: Path | None = None
    base: str | None = None
    original: str | None = None
    build: str | None = None
    corpus: Path = ROOT / "scripts" / "passages"
    licence: str = "apache-2.0"
    space: Path = ROOT / "space"
    results: Path = ROOT / "results"
    branch: str | None = None
    private: bool = False
    create_pr: bool = False

    @cached_property
    def jobs(self) -> list[tuple[str, str, Path | None]]:
        """(kind, repository id, checkpoint) of each repository.

        Raises:
            ValueError: there is no checkpoint.
        """
        kinds = ["model", *NAMES] if self.kind == "all" else [self.kind]
        jobs = []
        for kind in kinds:
            if kind != "model":
                jobs.append((kind, self.repo_id or f"{self.namespace}/{NAMES[kind]}", None))
                continue
            checkpoints = [self.checkpoint] if self.checkpoint else sorted((ROOT / "checkpoints").glob("*/"))
            if not checkpoints:
                raise ValueError(f"no folder in {ROOT / 'checkpoints'}: nothing to publish as a model.")
            if self.repo_id and len(checkpoints) > 1:
                names = ", ".join(folder.name for folder in checkpoints)
                raise ValueError(f"--repo-id names one repository; choose one of {names} with --checkpoint.")
            for folder in checkpoints:
                kind = "adapter" if is_adapter(folder) else "model"
                jobs.append((kind, self.repo_id or f"{self.namespace}/{folder.name}", folder))
        return jobs

    def target(self, kind: str, repo_id: str) -> Target:
        """Where a repository of a kind goes."""
        repo_type, marker = KINDS[kind]
        branch, has_versions = self.branch or "main", kind == "kernel" and self.branch is None
        if has_versions:
            version = tomllib.loads((ROOT / "kernels" / "build.toml").read_text())["general"]["version"]
            branch = f"v{version}"
        return Target(repo_id, repo_type, marker, self.tag, branch, self.private, self.create_pr, has_versions)


def assemble(
    release: Release, kind: str, repo_id: str, checkpoint: Path | None, folder: Path, models: dict[Path, tuple]
) -> None:
    """Make the new folder of one repository and check it.

    Args:
        models: folder, model and processor of each checkpoint that was assembled already; added to.

    Raises:
        ValueError: something is missing, or the folder does not do what its source does.
    """
    source = release.checkpoint or CHECKPOINT
    model_id = f"{release.namespace}/{source.name}"
    if kind == "model":
        pair = assembling.assemble_model(checkpoint, folder, repo_id, release.results, release.base, release.original)
        assembling.check_model(folder, *pair)
        models[checkpoint] = (folder, *pair)
    elif kind == "adapter":
        assembling.check_adapter(folder, *assembling.assemble_adapter(checkpoint, folder, repo_id, release.results))
    elif kind == "context":
        merged, *pair = _merged(release, source, folder, models)
        cache = assembling.assemble_context(release.corpus, folder, repo_id, *pair, model_id, release.licence)
        assembling.check_context(folder, cache, merged, *pair)
    elif kind == "dataset":
        assembling.assemble_dataset(release.build, folder, repo_id)
        assembling.check_dataset(folder)
    elif kind == "kernel":
        assembling.assemble_kernel(folder, repo_id, release.results)
        assembling.check_kernel(folder)
    else:
        assembling.assemble_space(release.space, folder, model_id)
        assembling.check_space(folder, *_merged(release, source, folder, models))


def _merged(release: Release, source: Path, folder: Path, models: dict[Path, tuple]) -> tuple:
    """Folder, model and processor of a checkpoint, assembled beside `folder` where it was not before."""
    if source not in models:
        merged, model_id = folder.parent / f".{source.name}", f"{release.namespace}/{source.name}"
        pair = assembling.assemble_model(source, merged, model_id, release.results, release.base, release.original)
        models[source] = (merged, *pair)
    return models[source]


def publish(release: Release, output: Path | None, dry_run: bool) -> None:
    """Assemble, check, compare, and unless `dry_run` upload, tag and read back.

    Args:
        output: keeps the assembled folders, OUTPUT/REPOSITORY; None: they are temporary.

    Raises:
        ValueError: anything that stands in the way; nothing was sent before all of it was looked at.
    """
    if not (ROOT / "pyproject.toml").is_file():
        raise ValueError(
            f"publishing needs a clone of the repository (licence, kernels, Space, figures), {ROOT} is none; "
            "clone it, and there `pip install -e '.[publish]'`."
        )
    api, refused = HfApi(), None
    targets = [release.target(kind, repo_id) for kind, repo_id, _ in release.jobs]
    try:
        for target in targets:
            check_rights(api, target)
    except ValueError as error:
        if not dry_run:
            raise
        refused = error
    with _work(output) as work:
        folders, changes, models = [], [], {}
        for (kind, repo_id, checkpoint), target in zip(release.jobs, targets, strict=True):
            folder = work / target.repo_type / repo_id.rpartition("/")[2]
            if folder.exists():
                raise ValueError(f"{folder} exists; remove it, or choose another --output.")
            folder.parent.mkdir(parents=True, exist_ok=True)
            print(f"{kind} {repo_id}: assembling and checking", flush=True)
            assemble(release, kind, repo_id, checkpoint, folder, models)
            folders.append(folder)
            found = Changes(files_of(folder), [], [], [], None, False, None)
            if refused is None:
                found = compare(api, folder, target)
            changes.append(found)
            print(f"{kind} {repo_id}: assembled and checked; the commit would be")
            print(*found.lines(), sep="\n", flush=True)
            if target.card_on_main:
                print(f"  (on the branch {target.branch}; main, which the Hub shows, has the card)", flush=True)
        if dry_run:
            print("dry run: nothing was sent")
            if refused is not None:
                print(f"an upload would be refused, and every file counts as new: {refused}")
            return
        for target, folder, found in zip(targets, folders, changes, strict=True):
            print(f"published {upload(api, folder, target, found, f'Release {target.tag}')}", flush=True)


@contextmanager
def _work(output: Path | None) -> Iterator[Path]:
    if output is not None:
        yield output
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)
