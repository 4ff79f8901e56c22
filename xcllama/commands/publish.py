"""`xcllama publish`: models, kernels, data sets, caches and the Space as Hub repositories.

Assembled, checked, compared, one commit each, tagged. The token is HF_TOKEN or what `hf auth login` stored.
"""

from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Kind = StrEnum("Kind", ["model", "kernel", "dataset", "context", "space", "all"])
EXAMPLES = """Examples:

xcllama publish all --namespace ORG --dry-run

xcllama publish model --repo-id ORG/NAME --checkpoint checkpoints/xc-smollm2-135m

xcllama publish model --repo-id ORG/NAME --checkpoint CONVERTED --base-model BASE_ID --original WHERE

xcllama publish dataset --repo-id ORG/NAME --build runs/mix

xcllama publish context --repo-id ORG/NAME --corpus FOLDER_OR_STORE --license cc-by-4.0
"""


@app.command(epilog=EXAMPLES)
def publish(
    kind: Annotated[Kind, typer.Argument(help="What to publish; a model may be an adapter.")],
    namespace: Annotated[str | None, typer.Option(help="Owner of the repositories.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Of one repository, in place of --namespace.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Added weights or a model; default: all there are.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the base, where the config names none.")] = None,
    original: Annotated[str | None, typer.Option(help="Of a converted model: where its checkpoint came from.")] = None,
    build: Annotated[str | None, typer.Option(help="Data set build, folder or URL; default: the PyPI mix.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Store or passages; default: scripts/passages.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the corpus's texts.")] = None,
    space: Annotated[Path | None, typer.Option(help="Folder of the Space.")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder of the figures in the cards.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; default: main, for the kernel v1.")] = None,
    tag: Annotated[str | None, typer.Option(help="Default: v and this project's version.")] = None,
    private: Annotated[bool, typer.Option("--private", help="New repositories are private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open pull requests, commit nothing.")] = False,
    output: Annotated[Path | None, typer.Option(help="Keep the assembled folders here.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="All but the upload.")] = False,
) -> None:
    """Assemble, check and upload; without --dry-run nothing is sent before all of it was looked at."""
    from xcllama.publishing import publishing

    if (namespace is None) == (repo_id is None) or (kind == Kind.all and repo_id):
        raise ValueError("give --namespace, or for one repository --repo-id, and not both.")
    given = {"base": base_model, "original": original, "build": build, "corpus": corpus, "licence": license}
    given |= {"space": space, "results": results, "branch": revision, "repo_id": repo_id, "checkpoint": checkpoint}
    release = publishing.Release(
        kind=kind.value,
        namespace=namespace or repo_id.split("/")[0],
        tag=tag or f"v{version('xcllama')}",
        private=private,
        create_pr=create_pr,
        **{name: value for name, value in given.items() if value is not None},
    )
    publishing.publish(release, output, dry_run)
