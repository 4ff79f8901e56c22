"""One configuration of every kernel compiles ahead of time for every chip and keeps the rules of the inspection."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "kernels" / "benchmarks" / "inspect_kernels.py"
KERNELS = {
    "forward_kernel", "decode_kernel", "combine_kernel", "query_gradient_kernel", "context_gradient_kernel",
    "inverse_rms_kernel", "project_kernel",
}  # fmt: skip


def run(*arguments: str, cwd: Path, interpreted: bool = False) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_one_configuration_of_every_kernel(target, tmp_path):
    result = run(
        "--one-a-kernel", "--targets", target, "--output", "inspect.json", "--cache", "cache.jsonl", cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == len(KERNELS)
    content = json.loads((tmp_path / "inspect.json").read_text())
    assert {record["kernel"] for record in content["kernels"]} == KERNELS
    for record in content["kernels"]:
        assert record["spill_bytes"] == 0
        assert 0 < record["registers"] <= 512
        assert 0 < record["occupancy"] <= 1
        assert record["bytes_required"] <= record["bytes_requested"]
        assert set(record["roofline_us"]) == {"H100", "MI300X"}
    by_kernel = {record["kernel"]: record for record in content["kernels"]}
    instruction = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}[target]
    assert by_kernel["forward_kernel"]["tensor_core_instructions_in_loops"][instruction] > 0
    assert by_kernel["decode_kernel"]["tensor_core_instructions_in_loops"]


ODD_SHAPES = """
import sys
sys.path.insert(0, {folder!r})
import torch
from ahead_of_time import TARGETS, inspect
from traffic import Shape
from variants import attention_tensors, meta
from xcllama_kernels.backward import plan_backward
from xcllama_kernels.decode import plan_decode
from xcllama_kernels.forward import plan_forward
from xcllama_kernels.project import plan_projection

target, half = TARGETS["sm_90"], torch.float16
# an argument of 1 becomes a constant of the kernel; 80 channels need a mask
for shape in (Shape(1, 1, 1, 1, 1, 1, 64), Shape(3, 2, 77, 5, 6, 2, 80)):
    tensors = attention_tensors(shape, half, 0)
    launches = plan_forward(**tensors, target=target) + plan_decode(**tensors, target=target, num_splits=2)
    del tensors["quantization"]
    tensors |= {{"grad_output": tensors["query"], "grad_lse": tensors["lse"]}}
    gradients = [tensors[name] for name in ("query", "key", "value")]
    launches += plan_backward(**tensors, gradients=gradients, target=target)
    tokens, heads = shape.batch, shape.num_kv_heads
    states, scale = meta(tokens, heads, 64, dtype=torch.int8), meta(tokens, heads, dtype=half)
    weight, bias = meta(tokens, 64 * heads, dtype=half), meta(tokens, dtype=half)
    norm, output = meta(64 * heads, dtype=half), meta(tokens, tokens, dtype=half)
    launches += plan_projection(states, scale, None, weight, bias, norm, 1e-5, output, target)
    assert len({{launch.name for launch in launches}}) == 7
    assert all(inspect(launch, "sm_90")["spill_bytes"] == 0 for launch in launches)
print("compiled")
"""


def test_shapes_of_one_and_odd_head_sizes(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = ODD_SHAPES.format(folder=str(SCRIPT.parent))
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout == "compiled\n", result.stderr[-2000:]


def test_nothing_is_compiled_under_the_interpreter(tmp_path):
    result = run("--one-a-kernel", "--output", "inspect.json", cwd=tmp_path, interpreted=True)
    assert "unset it" in result.stderr
    assert not (tmp_path / "inspect.json").exists()


def test_committed_table_keeps_the_rules(monkeypatch):
    """The table of `make kernels-inspect` has every variant of its precision and heads, and none breaks a rule."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    inspection = importlib.import_module("inspect_kernels")
    content = json.loads((SCRIPT.parent.parent.parent / "results" / "kernels_inspect.json").read_text())
    assert content["provenance"]["commit"]
    assert content["provenance"]["command"]
    records = content["kernels"]
    described = [
        inspection.describe(variant, target)
        for dtype in inspection.TABLE_DTYPES
        for target in inspection.TARGETS
        for variant in inspection.all_variants(inspection.TARGETS[target], dtype)
        if variant.head_dim in (None, *inspection.TABLE_HEAD_DIMS)
    ]
    assert [{name: record[name] for name in described[0]} for record in records] == described
    broken = [(record, found) for record in records if (found := inspection.problems(record))]
    assert not broken
    assert {row["batch"] for row in content["rooflines"]} == {1, 8, 64}
    for row in content["rooflines"]:
        for kind in ("decode_us", "forward_us"):
            assert row[kind].keys() == {"H100", "MI300X"}
            assert min(row[kind].values()) > 0


BROKEN = {
    "spills": {"spill_bytes": 4},
    "shared memory, the limit is 232448": {"shared_bytes": 232449},
    "no tensor core": {"tensor_core_instructions_in_loops": {}},
    "64 rows a tile but no wgmma": {"tensor_core_instructions_in_loops": {"mma.sync": 8}},
    "requests 106 bytes, 100 are required": {"kernel": "decode_kernel", "bytes_requested": 106},
}


@pytest.mark.parametrize(("message", "changes"), BROKEN.items(), ids=BROKEN)
def test_each_rule_can_fail(message, changes, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    problems = importlib.import_module("inspect_kernels").problems
    record = {
        "kernel": "forward_kernel", "target": "sm_90", "dtype": "bf16", "config": {"block_m": 64, "block_n": 16},
        "spill_bytes": 0, "shared_bytes": 232448, "tensor_core_instructions_in_loops": {"wgmma": 1},
        "bytes_required": 100, "bytes_requested": 105,
    }  # fmt: skip
    assert problems(record) == []
    assert len(problems(record | changes)) == (1 + ("no tensor" in message))
    assert message in problems(record | changes)[0]
