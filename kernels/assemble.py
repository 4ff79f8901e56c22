"""Assemble the folder that a Hub kernel repository holds: build/torch-<backend> for each backend, and the card.

    python kernels/assemble.py OUTPUT [--results results/kernels_inspect.json] [--repo-id NAME/KERNELS]

`kernels.get_local_kernel(OUTPUT)` loads it, and `get_kernel(repo, version=1)` once it is uploaded to branch v1.
There is nothing to compile: every backend holds the same Python files. This file is run by path or loaded by path: the
folder is no package, or it would hide the library `kernels`.
"""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent
PACKAGE = PROJECT / "torch-ext" / "xcllama_kernels"


def source_digest(files: list[Path]) -> str:
    """SHA-256 over the names and contents of the package's files."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def metadata(backend: str, general: dict, digest: str) -> dict:
    """metadata.json of one backend; the id is the module's name, unique to backend and content."""
    return {
        "id": f"_{general['name'].replace('-', '_')}_{backend}_{digest[:12]}",
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
    }


def inspection_table(results: Path) -> str:
    """Markdown: registers, spills, shared memory and tensor core instructions of each kernel on each chip."""
    records = json.loads(results.read_text())["kernels"]
    lines = [
        "| kernel | chip | dtype | variants | registers | spilled bytes | shared bytes | tensor core instructions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["kernel"], record["target"], record["dtype"]), []).append(record)
    for (kernel, target, dtype), rows in groups.items():
        kinds = sorted({kind for row in rows for kind in row["tensor_core_instructions"]})
        numbers = [max(row[name] for row in rows) for name in ("registers", "spill_bytes", "shared_bytes")]
        cells = [kernel, target, dtype, len(rows), *numbers, ", ".join(kinds) or "none"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def fill_card(template: str, repo_id: str, results: Path | None) -> str:
    """The card with its slots filled from the committed results; without results that section is left out."""
    before, _, rest = template.replace("{{repo_id}}", repo_id).partition("<!-- results -->\n")
    section, _, after = rest.partition("<!-- /results -->\n")
    if results is None:
        return before + after
    run = json.loads(results.read_text())["provenance"]
    slots = {"table": inspection_table(results)} | {name: run[name] for name in ("command", "commit", "date")}
    for name, value in slots.items():
        section = section.replace("{{" + name + "}}", value)
    return before + section + after


def assemble(output: str | Path, results: str | Path | None = None, repo_id: str = "xcllama/xcllama-kernels") -> Path:
    """Write the repository folder at `output`, which must not exist, and return it.

    Args:
        output: the new folder; it appears at once and whole.
        results: kernels_inspect.json for the card's table; None leaves the table out.
        repo_id: the Hub repository that the card tells readers to load.

    Raises:
        ValueError: `output` exists.
    """
    output = Path(output).absolute()
    if output.exists():
        raise ValueError(f"the output must be a new folder, got {output}; remove it or choose another.")
    general = tomllib.loads((PROJECT / "build.toml").read_text())["general"]
    files = sorted(PACKAGE.glob("*.py"))
    digest = source_digest(files)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        root = Path(temporary) / "kernel"
        for backend in general["backends"]:
            folder = root / "build" / f"torch-{backend}"
            folder.mkdir(parents=True)
            for file in files:
                shutil.copy(file, folder)
            (folder / "metadata.json").write_text(json.dumps(metadata(backend, general, digest), indent=2) + "\n")
        shutil.copy(PROJECT / "build.toml", root)
        shutil.copytree(
            PROJECT / "torch-ext", root / "torch-ext", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
        shutil.copy(PROJECT.parent / "LICENSE", root)
        card = fill_card((PROJECT / "CARD.md").read_text(), repo_id, None if results is None else Path(results))
        (root / "README.md").write_text(card)
        os.replace(root, output)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--repo-id", default="xcllama/xcllama-kernels")
    arguments = parser.parse_args()
    print(assemble(arguments.output, arguments.results, arguments.repo_id))
