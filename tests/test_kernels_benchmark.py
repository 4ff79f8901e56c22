"""The GPU benchmark, run through on tiny shapes in the interpreter: every case is right, every candidate launches."""

import importlib
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from xcllama_kernels.launch import INTERPRETED  # noqa: E402

if not INTERPRETED:
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set; `make test` sets it", allow_module_level=True)

BENCHMARKS = Path(__file__).resolve().parent.parent / "kernels" / "benchmarks"
CPU = torch.device("cpu")


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
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    flash = types.ModuleType("flash_attn")
    flash.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    flash.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    return importlib.import_module("benchmark")


@pytest.fixture
def ceilings(benchmark):
    return benchmark.Ceilings(bandwidth=1e9, operations=1e12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_case_is_right(benchmark, ceilings):
    works = [replace(work, compiled=True) if hasattr(work, "compiled") else work for work in benchmark.all_cases(True)]
    records = [record for work in works for record in benchmark.records_of(work, False, CPU, ceilings)]
    assert len(records) == len(works)
    assert not any(map(benchmark.is_wrong, records))
    for record in records:
        calls = {name: result for name, result in record.items() if isinstance(result, dict) and name != "shape"}
        if record["kind"] != "projection":
            # its varlen form reads no context twice
            once = record["shape"]["contexts"] == record["shape"]["batch"]
            others = {"sdpa", "flex_attention"} | ({"flash_attention"} if once else set())
            assert set(calls) == {"ours"} | (set() if record["bits"] else others)
            assert calls["ours"]["of_copy"] == pytest.approx(record["bytes"] / calls["ours"]["us"] / 1e3)
        if record["kind"] == "training":
            # torch has no such gradient without a GPU, and the record says so
            assert "does not support backward on CPU" in calls.pop("flex_attention")["failed"]
        for name, result in calls.items():
            tolerance = benchmark.QUANTIZED_TOLERANCE if record.get("bits") else benchmark.TOLERANCE
            assert result.get("error", 1.0) < tolerance, (name, result)


def test_what_is_moved_and_computed(benchmark):
    cases = importlib.import_module("cases")
    work = cases.Work("prefill", cases.Shape(2, 2, 100, 10, 4, 2, 64), 0)
    moved, operations = cases.required(work)
    assert operations == 2 * 2 * (2 * 10 * 4) * 100 * 64
    assert moved == pytest.approx(2 * 2 * (200 * 2 * 64) + 2 * 2 * (20 * 4 * 64), rel=0.01)
    assert cases.required(replace(work, kind="training"))[1] == operations // 2 * 7


def test_every_candidate_launches(benchmark, ceilings):
    records = [
        record for work in benchmark.all_cases(True) for record in benchmark.records_of(work, True, CPU, ceilings)
    ]
    assert {record["kernel"] for record in records} == {
        "forward_kernel", "decode_kernel", "query_gradient_kernel", "context_gradient_kernel", "project_kernel",
    }  # fmt: skip
    assert not any("failed" in record for record in records)


def test_what_fails_is_said_and_fails_the_run(benchmark, ceilings, monkeypatch):
    def broken(*inputs, **options):
        raise RuntimeError("out of resource: shared memory\nsecond line")

    monkeypatch.setattr(importlib.import_module("cases"), "cross_attention", broken)
    (record,) = benchmark.records_of(benchmark.all_cases(True)[1], False, CPU, ceilings)
    assert "out of resource" in record["ours"]["failed"]
    assert benchmark.is_wrong(record)


def test_targets_take_the_worst_that_was_measured(benchmark):
    def record(kind, length, bits, us, of_copy=0.5, **others):
        shape = {"context_len": length, "head_dim": 128}
        ours = {"us": us, "of_copy": of_copy, "of_product": of_copy}
        return {"kind": kind, "shape": shape, "bits": bits, "ours": ours, **others}

    records = [
        record("decode", 8192, 0, 10.0, 0.9),
        record("decode", 65536, 0, 80.0, 0.8),
        record("decode", 65536, 8, 40.0),
        record("decode", 1024, 0, 5.0, 0.1),
        record("decode, shared context", 8192, 0, 10.0, sdpa={"us": 200.0}),
        {"kind": "prefill", "shape": {"head_dim": 128}, "bits": 0, "ours": {"failed": "RuntimeError"}},
        {"kind": "decode", "shape": {"context_len": 8192}, "bits": 4, "left_out": "needs 100 GiB"},
    ]
    measured = {row["target"].split(":")[0]: row["measured"] for row in benchmark.targets(records)}
    assert list(measured.values()) == [0.8, None, 20.0, 2.0, None]
    assert [benchmark.is_wrong(row) for row in records[-2:]] == [True, False]
