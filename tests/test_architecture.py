"""The rules that keep the project in one piece: who may import whom, and names that shadow nothing."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# what a wheel installs, and nothing else
ROOTS = {"modeling_xcllama", "xcllama_kernels", "dataset_builders", "xcllama"}
PACKAGES = {
    "modeling_xcllama": ROOT / "modeling_xcllama",
    "xcllama_kernels": ROOT / "kernels" / "torch-ext" / "xcllama_kernels",
    "dataset_builders": ROOT / "dataset_builders",
    "xcllama.commands": ROOT / "xcllama" / "commands",
    "xcllama.serving": ROOT / "xcllama" / "serving",
    "xcllama.store": ROOT / "xcllama" / "store",
    "xcllama.training": ROOT / "xcllama" / "training",
    "xcllama.evaluation": ROOT / "xcllama" / "evaluation",
    "xcllama.gpu_check": ROOT / "xcllama" / "gpu_check",
    "xcllama.publishing": ROOT / "xcllama" / "publishing",
    "space": ROOT / "space",
}
# which of our packages a package may import
ALLOWED = {
    "modeling_xcllama": {"xcllama_kernels"},
    "xcllama_kernels": set(),
    "dataset_builders": set(),
    "xcllama.store": {"modeling_xcllama"},
    "xcllama.commands": {
        "dataset_builders",
        "xcllama.serving",
        "xcllama.store",
        "xcllama.training",
        "xcllama.evaluation",
        "xcllama.publishing",
    },
    "xcllama.serving": {"modeling_xcllama", "xcllama.store"},
    "xcllama.training": {"modeling_xcllama", "dataset_builders", "xcllama.store"},
    "xcllama.evaluation": {"modeling_xcllama", "dataset_builders", "xcllama.store"},
    "xcllama.gpu_check": {
        "modeling_xcllama",
        "xcllama_kernels",
        "dataset_builders",
        "xcllama.training",
        "xcllama.evaluation",
    },  # fmt: skip
    "xcllama.publishing": {"modeling_xcllama", "dataset_builders", "xcllama.store"},
    "space": set(),
}
# what remote code and data builders may need from outside
OUTSIDE = {
    "modeling_xcllama": {"torch", "transformers", "safetensors", "huggingface_hub", "tqdm"},
    "xcllama_kernels": {"torch", "triton"},
}
FORBIDDEN = {"dataset_builders": {"torch", "transformers"}}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imported(path: Path) -> set[str]:
    """Packages of the absolute imports of a file, wherever they stand in it: of `xcllama` its sub-packages."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "xcllama" else {node.module}
            )
    return {".".join(name.split(".")[: 2 if name.startswith("xcllama.") else 1]) for name in names}


def test_every_package_is_checked():
    assert sources(PACKAGES["modeling_xcllama"])
    assert sources(PACKAGES["xcllama_kernels"])
    assert ALLOWED.keys() == PACKAGES.keys()
    inside = {f"xcllama.{path.parent.name}" for path in (ROOT / "xcllama").glob("*/__init__.py")}
    assert inside == {name for name in PACKAGES if name.startswith("xcllama.")}


def test_a_wheel_installs_the_roots_and_nothing_else(tmp_path):
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path / "wheel")]
    ignored = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "runs", "results", "checkpoints", "tests"
    )
    # from a copy: a build leaves files in the folder that it builds from
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tmp_path / "source")], check=True)
    (wheel,) = (tmp_path / "wheel").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == ROOTS
    for folder in ("xcllama/templates", "xcllama/training/recipes", "xcllama/evaluation/tasks"):
        shipped = {Path(name).name for name in names if name.startswith(f"{folder}/")}
        source = ROOT / "model_cards" if folder == "xcllama/templates" else ROOT / folder
        assert shipped == {path.name for path in source.iterdir() if path.is_file()}
    for name, folder in PACKAGES.items():
        if name != "space":
            assert {f"{name.replace('.', '/')}/{path.relative_to(folder)}" for path in sources(folder)} <= set(names)


@pytest.mark.parametrize("package", PACKAGES)
def test_who_imports_whom(package):
    for path in sources(PACKAGES[package]):
        found = imported(path)
        ours = (found & PACKAGES.keys()) - {package}
        assert ours <= ALLOWED[package], f"{path} imports {ours - ALLOWED[package]}"
        assert not found & {"scripts", "tests", "conftest"}, path
        assert not found & FORBIDDEN.get(package, set()), path
        if package in OUTSIDE:
            foreign = {name for name in found if name not in sys.stdlib_module_names} - PACKAGES.keys()
            assert foreign <= OUTSIDE[package], f"{path} imports {foreign - OUTSIDE[package]}"


def test_optional_packages_are_not_imported_at_the_top_of_remote_code():
    for path in sources(PACKAGES["modeling_xcllama"]):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                text = ast.unparse(node)
                assert not re.search(r"\b(triton|kernels|xcllama_kernels)\b", text), f"{path}: {text}"


def test_remote_code_imports_siblings_as_the_loader_finds_them():
    """`from .name import x` in one flat folder, and no cycle."""
    folder = PACKAGES["modeling_xcllama"]
    assert [path.parent for path in sources(folder)] == [folder] * len(sources(folder))
    siblings = {}
    for path in sources(folder):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert all(node.level == 1 and node.module and "." not in node.module for node in nodes), path
        siblings[path.stem] = {node.module for node in nodes}

    def reach(name, seen):
        assert name not in seen, f"import cycle: {' -> '.join([*seen, name])}"
        for other in siblings[name]:
            reach(other, (*seen, name))

    reach("__init__", ())


def test_the_folder_kernels_does_not_shadow_the_package_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    origin = Path(importlib.util.find_spec("kernels").origin)
    assert ROOT / "kernels" not in origin.parents
    assert str(ROOT) not in [str(Path(entry or ".").resolve()) for entry in sys.path if entry], sys.path
    assert not (ROOT / "tests" / "kernels").exists()


def test_no_script_or_test_shadows_a_module():
    code = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    names = [path.stem for folder in ("scripts", "tests") for path in (ROOT / folder).glob("*.py")]
    # from elsewhere: this process may have the scripts themselves on its path
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"


def test_readme_tree_is_true():
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"```text\n(.*?)```", text, re.DOTALL).group(1)
    named = [line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")]
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    folders = {line.split("/")[0] + "/" for line in tracked.splitlines() if "/" in line and not line.startswith(".")}
    assert folders <= set(named), f"not in the README's tree: {folders - set(named)}"
