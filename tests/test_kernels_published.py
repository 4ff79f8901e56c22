"""The published form of the kernels loads in a clean process, by path and by LOCAL_KERNELS."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels._rust import Metadata

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def assembler():
    # by path: `kernels` is the library, the folder of that name is no package
    spec = importlib.util.spec_from_file_location("assemble_kernels", ROOT / "kernels" / "assemble.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(assembler, tmp_path_factory) -> Path:
    folder = assembler.assemble(tmp_path_factory.mktemp("hub") / "xcllama-kernels")
    # here, before a test imports from it
    assert not list(folder.rglob("__pycache__"))
    return folder


CHECK = """
import sys, torch
import kernels
{load}
import xcllama_kernels
assert {root!r} in kernel.__file__ and kernel.__file__ != xcllama_kernels.__file__, kernel.__file__
from xcllama_kernels.cases import random_case
case = random_case([40, 9], [0, 1, 0], 1)
case.query.requires_grad_()
output = kernel.cross_attention(*case.arguments)
output.sum().backward()
counts = sys.modules[kernel.__name__ + ".launch"].launch_counts
assert counts["decode_kernel"] == counts["query_gradient_kernel"] == 1, counts
assert sum(xcllama_kernels.launch.launch_counts.values()) == 0
assert torch.equal(output, xcllama_kernels.cross_attention(*case.arguments))
print("same", sorted(kernel.__all__) == sorted(xcllama_kernels.__all__))
"""


@pytest.mark.parametrize("way", ["get_local_kernel", "LOCAL_KERNELS"])
def test_loads_in_a_clean_process(repository, tmp_path, way):
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    if way == "LOCAL_KERNELS":
        environment["LOCAL_KERNELS"] = f"someone/xcllama-kernels={repository}"
        load = "kernel = kernels.get_kernel('someone/xcllama-kernels', version=1)"
    else:
        load = f"from pathlib import Path\nkernel = kernels.get_local_kernel(Path({str(repository)!r}))"
    code = CHECK.format(load=load, root=str(repository))
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout == "same True\n", run.stderr


ORDER = """
import logging, os
from modeling_xcllama import cross_attention
logging.basicConfig(level=logging.INFO)
folder = {root!r}
for environment, inside in [
    ({{"LOCAL_KERNELS": "xcllama/xcllama-kernels=" + folder}}, True),
    ({{"LOCAL_KERNELS": "someone/other=" + folder, "XCLLAMA_KERNEL": "someone/other"}}, True),
    ({{}}, False),
]:
    for name in ("LOCAL_KERNELS", "XCLLAMA_KERNEL"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    cross_attention._kernels.clear()
    found = [cross_attention.find_kernels() for _ in range(2)]
    assert found[0] is found[1] and (folder in found[0].__file__) == inside, found
"""


def test_the_model_looks_in_order_and_says_once_what_it_took(repository, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    code = ORDER.format(root=str(repository))
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    said = [line.partition("cross-attention kernels: ")[2] for line in run.stderr.splitlines() if "kernels: " in line]
    assert said == ["xcllama/xcllama-kernels", "someone/other", "the installed package xcllama_kernels"]


def test_layout(repository):
    identifiers = set()
    for backend in ("cuda", "rocm", "cpu"):
        folder = repository / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(folder / "metadata.json")
        identifiers.add(metadata.id)
        assert (metadata.name.python_name, metadata.version, metadata.license) == ("xcllama_kernels", 1, "Apache-2.0")
        assert str(metadata.backend.backend_type).lower() == backend
        assert (folder / "__init__.py").is_file()
    assert len(identifiers) == 3
    assert "{{" not in (repository / "README.md").read_text()


def test_refuses_an_existing_folder(assembler, tmp_path):
    with pytest.raises(ValueError, match="must be a new folder"):
        assembler.assemble(tmp_path)


def test_card_takes_its_numbers_from_the_results(assembler, tmp_path):
    record = {
        "kernel": "decode_kernel", "target": "sm_90", "dtype": "bf16", "registers": 91, "spill_bytes": 0,
        "shared_bytes": 4096, "tensor_core_instructions": {"mma.sync": 32},
    }  # fmt: skip
    results = tmp_path / "inspect.json"
    made = {"command": "make it", "commit": "abc", "date": "today"}
    run = {"kernels": [record, record | {"registers": 123}], "provenance": made}
    results.write_text(json.dumps(run))
    card = (assembler.assemble(tmp_path / "out", results) / "README.md").read_text()
    assert "| decode_kernel | sm_90 | bf16 | 2 | 123 | 0 | 4096 | mma.sync |" in card
    assert "`make it` at commit abc on today" in card
    assert "{{" not in card


def test_the_library_kernels_is_not_our_folder():
    origin = Path(importlib.util.find_spec("kernels").origin)
    assert ROOT / "kernels" not in origin.parents
    assert not (ROOT / "kernels" / "__init__.py").exists()
