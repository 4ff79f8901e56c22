"""Bad input is refused before any launch, by a message that names the value."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import subprocess  # noqa: E402
import sys  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from xcllama_kernels import cross_attention, project_quantized  # noqa: E402
from xcllama_kernels.cases import random_case, random_quantized  # noqa: E402
from xcllama_kernels.checks import _check_device, check_attention_values  # noqa: E402
from xcllama_kernels.launch import INTERPRETED, launch_counts  # noqa: E402

if not INTERPRETED:
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set; `make test` sets it", allow_module_level=True)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


WRONG = {
    "query dims": ({"query": torch.randn(2, 4, 32)}, r"`query` must be .*got \(2, 4, 32\)"),
    "query dtype": ({"query": torch.randn(2, 1, 4, 32).double()}, "float16, bfloat16 or float32, got torch.float64"),
    "head_dim small": ({"query": torch.randn(2, 1, 4, 8)}, r"\[16, 256\], got 8"),
    "head_dim large": ({"query": torch.randn(2, 1, 4, 264)}, r"\[16, 256\], got 264"),
    "head_dim odd": ({"query": torch.randn(2, 1, 4, 36)}, "multiple of 8 .*got 36"),
    "key dims": ({"key": torch.randn(30, 64)}, r"\[num_tokens, heads, dim\], got \(30, 64\)"),
    "key tokens": ({"key": torch.empty(2**30 + 1, 2, 32, device="meta")}, r"at most 2\*\*30 tokens, got 1073741825"),
    "key heads": (
        {name: torch.empty(1, 2**16, 32, device="meta") for name in ("key", "value")}
        | {"query": torch.empty(2, 1, 2**16, 32, device="meta")},
        "less than 65536, got 65536",
    ),
    "key dtype": ({"key": torch.randn(30, 2, 32).half()}, "`key` must have the dtype of `query`.*got torch.float16"),
    "key dim": ({"key": torch.randn(30, 2, 40)}, r"head_dim of `query` \(32\), got 40"),
    "value tokens": ({"value": torch.randn(29, 2, 32)}, r"tokens and heads of `key` \(30, 2\), got \(29, 2\)"),
    "heads": ({"query": torch.randn(2, 1, 5, 32)}, r"multiple of num_kv_heads \(2\), got 5"),
    "offsets dims": ({"offsets": int32(0)}, r"\[num_contexts \+ 1\], got \(1,\)"),
    "offsets dtype": ({"offsets": torch.tensor([0.0, 10.0, 30.0])}, "`offsets` must be int32 or int64, got"),
    "offsets decrease": ({"offsets": int32(0, 20, 10)}, "must not decrease, got 20 then 10 at 1"),
    "offsets start": ({"offsets": int32(-1, 10, 30)}, "start at 0 or later, got -1"),
    "offsets end": ({"offsets": int32(0, 10, 31)}, r"end of the tokens \(30\), got 31"),
    "index size": ({"context_index": int32(0)}, r"\[batch\] = \[2\], got \(1,\)"),
    "index dtype": ({"context_index": torch.tensor([0.0, 1.0])}, "`context_index` must be int32 or int64"),
    "index large": ({"context_index": int32(0, 2)}, r"lie in \[0, 1\], got 2"),
    "index negative": ({"context_index": int32(0, -1)}, r"lie in \[0, 1\], got -1"),
    "zero without scale": ({"key_zero": torch.zeros(30, 2, 1).half()}, "`key_zero` needs `key_scale`"),
    "scale of floats": ({"key_scale": torch.zeros(30, 2).half()}, "must be int8, got torch.float32"),
    "device": ({"key": torch.empty(30, 2, 32, device="meta")}, "one device, got .*meta"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_attention_refuses(changes, message):
    case = random_case([10, 20], [0, 1])
    names = ("query", "key", "value", "offsets", "context_index")
    counts = launch_counts.copy()
    with pytest.raises(ValueError, match=message):
        cross_attention(**(dict(zip(names, case.arguments, strict=True)) | changes))
    assert launch_counts == counts


@pytest.mark.parametrize(
    ("bits", "name", "wrong", "message"),
    [
        (8, "key_scale", torch.zeros(30, 2), "`key_scale` must be float16"),
        (8, "value_scale", torch.zeros(30, 1).half(), r"`value_scale` must be \(30, 2, 3\), got \(30, 1\)"),
        (8, "key_zero", torch.zeros(30, 2, 1).half(), "must be uint8"),
        (8, "value_scale", None, "`value` must have the dtype of `query`"),
        (4, "key_scale", torch.zeros(30, 2).half(), r"`key_scale` must be \(30, 2, 1, 3\)"),
        (4, "value_zero", torch.zeros(30, 2, 2).half(), r"`value_zero` must be \(30, 2, 1\)"),
        (4, "value_zero", None, "must be int8"),
    ],
)
def test_quantized_attention_refuses(bits, name, wrong, message):
    case = random_case([10, 20], [0, 1], bits=bits)
    with pytest.raises(ValueError, match=message):
        cross_attention(*case.arguments, **(case.quantization | {name: wrong}))


def test_int4_head_dim():
    data, scale, zero = (tensor[:, :1] for tensor in random_quantized(5, 2, 64, 4))
    data = data.repeat(1, 1, 2)[..., :48]
    scales = {"key_scale": scale, "key_zero": zero, "value_scale": scale, "value_zero": zero}
    with pytest.raises(ValueError, match="multiple of 64, got 96; use int8"):
        cross_attention(torch.randn(1, 1, 1, 96), data, data, int32(0, 5), int32(0), **scales)


def test_projection_refuses():
    states, scale, _ = random_quantized(5, 2, 64, 8)
    weight = torch.randn(8, 128)
    counts = launch_counts.copy()
    for changes, message in [
        ({"weight": torch.randn(8, 64)}, r"\[out, 128\], got \(8, 64\)"),
        ({"weight": weight.double()}, "float16, bfloat16 or float32"),
        ({"bias": torch.randn(7)}, r"`bias` must be \[8\], got \(7,\)"),
        ({"bias": torch.randn(8).half()}, "`bias` must have the dtype"),
        ({"norm_weight": torch.ones(128)}, "go together"),
        ({"norm_weight": torch.ones(64), "norm_eps": 1e-5}, r"`norm_weight` must be \[128\]"),
        ({"scale": scale[:4]}, r"`states_scale` must be \(5, 2, 3\)"),
        ({"states": states.view(5, 4, 32), "scale": scale.repeat(1, 2, 1)}, r"multiple of 64 channels.*got \(4, 32\)"),
    ]:
        arguments = {"states": states, "scale": scale, "zero": None, "weight": weight} | changes
        with pytest.raises(ValueError, match=message):
            project_quantized(**arguments)
    assert launch_counts == counts


def test_each_version_of_the_indices_is_read_once(monkeypatch):
    reads = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: reads.append(tensor) or original(tensor))
    offsets, index = int32(0, 10, 30), int32(0, 1)
    for _ in range(3):
        check_attention_values(offsets, index, 30)
    assert len(reads) == 2
    index[0] = 7
    for _ in range(2):
        with pytest.raises(ValueError, match="got 7"):
            check_attention_values(offsets, index, 30)
    assert len(reads) == 4
    with pytest.raises(ValueError, match="got 30"):
        check_attention_values(offsets, int32(0), 29)


def test_the_operator_keeps_the_identity_of_the_indices(monkeypatch):
    case = random_case([10, 20], [0, 1])
    cross_attention(*case.arguments)

    def fail(tensor):
        raise AssertionError("read again")

    monkeypatch.setattr("xcllama_kernels.checks._check_offsets", fail)
    cross_attention(*case.arguments)


def test_cpu_tensors_need_the_interpreter():
    code = """
import torch
from xcllama_kernels.cases import random_case
from xcllama_kernels import cross_attention
case = random_case([10, 20], [0, 1])
try:
    cross_attention(*case.arguments)
except ValueError as error:
    assert "got 'cpu'" in str(error) and "sdpa" in str(error), error
    print("refused")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert run.stdout == "refused\n", run.stderr


def test_devices_are_named():
    with pytest.raises(ValueError, match="'key': 'meta'"):
        _check_device({"query": torch.empty(1), "key": torch.empty(1, device="meta"), "zero": None})
