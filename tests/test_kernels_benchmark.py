"""The GPU benchmark, run through on tiny shapes in the interpreter: every case is right, every candidate launches."""

import importlib
import os
import sys
import types
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from xcllama_kernels.launch import INTERPRETED  # noqa: E402

if not INTERPRETED:
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set; `make test` sets it", allow_module_level=True)

BENCHMARKS = Path(__file__).resolve().parent.parent / "kernels" / "benchmarks"


def varlen(query, key, value, query_bounds, key_bounds, query_len, key_len):
    """The contract of `flash_attn_varlen_func`, a row at a time."""
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    rows = []
    for first, last, start, end in zip(
        query_bounds[:-1], query_bounds[1:], key_bounds[:-1], key_bounds[1:], strict=True
    ):
        assert (last - first, end - start) == (query_len, key_len)
        states = (query[first:last], key[start:end], value[start:end])
        by_head = (tensor.transpose(0, 1) for tensor in states)
        rows.append(torch.nn.functional.scaled_dot_product_attention(*by_head, enable_gqa=True).transpose(0, 1))
    return torch.cat(rows)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("benchmark")
    shape = module.Shape
    monkeypatch.setattr(
        module,
        "SHAPES",
        {
            "decode": [shape(2, 2, 20, 1, 2, 1, 16)],
            "decode, shared context": [shape(2, 1, 20, 1, 3, 1, 64)],
            "prefill": [shape(1, 1, 20, 33, 2, 1, 16)],
            "training": [shape(2, 2, 20, 5, 2, 1, 16)],
        },
    )
    monkeypatch.setattr(module, "PROJECTIONS", [(20, 1, 32)])
    monkeypatch.setattr(module, "microseconds", lambda call: (call(), 1.0)[1])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    flash = types.ModuleType("flash_attn")
    flash.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    flash.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    return module


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_case_is_right(benchmark):
    records = list(benchmark.all_records(False, "cpu"))
    assert len(records) == 3 + 3 + 3 + 1 + 2
    assert not any(map(benchmark.is_wrong, records))
    for record in records:
        calls = {name: result for name, result in record.items() if isinstance(result, dict) and name != "shape"}
        if record["kind"] != "projection":
            others = set() if record["bits"] else {"sdpa", "flex_attention", "flash_attention"}
            assert set(calls) == {"ours"} | others
        if record["kind"] == "training":
            # torch has no such gradient without a GPU, and the record says so
            assert "does not support backward on CPU" in calls.pop("flex_attention")["failed"]
        for name, result in calls.items():
            assert result.get("error", 1.0) < benchmark.TOLERANCE, (name, result)


def test_every_candidate_launches(benchmark):
    records = list(benchmark.all_records(True, "cpu"))
    assert {record["kernel"] for record in records} == {
        "forward_kernel", "decode_kernel", "query_gradient_kernel", "context_gradient_kernel", "project_kernel",
    }  # fmt: skip
    assert not any(map(benchmark.is_wrong, records))


def test_what_fails_is_said_and_fails_the_run(benchmark, monkeypatch):
    def broken(*inputs, **options):
        raise RuntimeError("out of resource: shared memory\nsecond line")

    monkeypatch.setattr(benchmark, "cross_attention", broken)
    record = benchmark.time_case("decode", benchmark.SHAPES["decode"][0], 8, "cpu")
    assert "out of resource" in record["ours"]["failed"]
    assert benchmark.is_wrong(record)
