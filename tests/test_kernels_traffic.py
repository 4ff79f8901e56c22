"""The bytes that `traffic.py` counts are those that the kernels request in the interpreter."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import importlib.util  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from counted_traffic import counted_traffic  # noqa: E402
from xcllama_kernels.backward import plan_backward  # noqa: E402
from xcllama_kernels.cases import random_case, random_quantized  # noqa: E402
from xcllama_kernels.decode import plan_decode  # noqa: E402
from xcllama_kernels.forward import plan_forward  # noqa: E402
from xcllama_kernels.launch import INTERPRETED, Quantization  # noqa: E402
from xcllama_kernels.project import plan_projection  # noqa: E402

if not INTERPRETED:
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set; `make test` sets it", allow_module_level=True)

BENCHMARKS = Path(__file__).resolve().parent.parent / "kernels" / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"kernel_benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


traffic = load("traffic")


def prepare(shape, bits):
    case = random_case(
        [shape.context_len] * shape.contexts, [row % shape.contexts for row in range(shape.batch)], shape.query_len,
        shape.num_heads, shape.num_kv_heads, shape.head_dim, torch.float16, bits,
    )  # fmt: skip
    output = torch.empty_like(case.query)
    lse = torch.empty(shape.batch, shape.num_heads, shape.query_len)
    return case, Quantization(**case.quantization), output, lse


def measure(launches) -> int:
    with counted_traffic() as requested:
        for launch in launches:
            launch.run()
    return requested.total


@pytest.mark.parametrize("bits", [0, 8, 4], ids=["plain", "int8", "int4"])
@pytest.mark.parametrize(
    ("shape", "num_splits"),
    [
        (traffic.Shape(3, 3, 130, 1, 4, 2, 128), 1),
        (traffic.Shape(5, 1, 150, 2, 3, 1, 64), 3),
        (traffic.Shape(4, 2, 64, 1, 2, 1, 64), 4),
    ],
    ids=["a-context-each", "one-shared", "short-splits"],
)
def test_decode(shape, num_splits, bits):
    case, quantization, output, lse = prepare(shape, bits)
    launches = plan_decode(
        *case.arguments[:3], quantization, *case.arguments[3:], output, lse, 0.1, num_splits=num_splits
    )
    counted = traffic.decode_traffic(launches, shape)
    assert measure(launches) == counted.requested
    if num_splits > 1:
        assert measure(launches[1:]) == traffic.combine_traffic(launches, shape).requested


@pytest.mark.parametrize("bits", [0, 8, 4], ids=["plain", "int8", "int4"])
def test_forward(bits):
    shape = traffic.Shape(3, 2, 70, 40, 6, 2, 64)
    case, quantization, output, lse = prepare(shape, bits)
    launches = plan_forward(*case.arguments[:3], quantization, *case.arguments[3:], output, lse, 0.1)
    assert measure(launches) == traffic.forward_traffic(launches[0], shape).requested


def test_backward():
    shape = traffic.Shape(3, 2, 70, 40, 6, 2, 64)
    case, _, output, lse = prepare(shape, 0)
    lse.zero_()
    output.zero_()
    gradients = tuple(torch.empty_like(tensor) for tensor in case.arguments[:3])
    launches = plan_backward(output, None, *case.arguments, output, lse, 0.1, gradients)
    assert measure(launches[:1]) == traffic.query_gradient_traffic(launches[0], shape).requested
    counted = traffic.context_gradient_traffic(launches[1], shape).requested
    # the bounds of contexts and the repeated lookups of a batch row are left out of the count
    assert measure(launches[1:]) == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize("bits", [8, 4])
def test_projection(bits):
    data, scale, zero = random_quantized(130, 2, 64, bits)
    weight, norm_weight = torch.randn(200, 128).half(), torch.ones(128).half()
    output = torch.empty(130, 200).half()
    launches = plan_projection(data, scale, zero, weight, None, norm_weight, 1e-5, output)
    for launch in launches:
        assert measure([launch]) == traffic.projection_traffic(launch).requested


def test_shared_context_is_read_once():
    """32 rows of 4 heads that share a context fill one tile: the context's bytes are requested once."""
    shape = traffic.Shape(32, 1, 512, 1, 4, 1, 64)
    case, quantization, output, lse = prepare(shape, 0)
    launches = plan_decode(*case.arguments[:3], quantization, *case.arguments[3:], output, lse, 0.1, num_splits=1)
    context_bytes = 2 * 512 * 64 * 2
    row_bytes = 32 * 4 * (2 * 64 * 2 + 4)
    assert context_bytes + row_bytes < measure(launches) < 1.1 * (context_bytes + row_bytes)
