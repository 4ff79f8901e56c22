"""16-bit weights on a CPU without 16-bit products: many rows in float32, by this thread alone, nothing emulated."""

import threading

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_xcllama import wide_products
from modeling_xcllama.wide_products import MANY_ROWS, WideProducts, has_native_products

PRODUCTS = ("::mm", "::addmm", "::bmm", "::baddbmm", "::linear")


class Products(TorchDispatchMode):
    """Notes (rows, dtype) of every product that is computed."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in function.name() for name in PRODUCTS):
            left = next(arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() > 1)
            self.seen.append((left.numel() // left.shape[-1], left.dtype))
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=["xcllama", "joint"])
def half_model(request, make_sharp_model):
    options = {"cross_attention_mode": "joint"} if request.param == "joint" else {}
    return make_sharp_model(**options).to(torch.bfloat16).eval()


@pytest.fixture
def emulated(monkeypatch):
    """A CPU without 16-bit products."""
    monkeypatch.setenv(wide_products.VARIABLE, "always")


@torch.no_grad()
def test_products_of_many_rows_run_in_float32(half_model, emulated):
    ids = torch.arange(3, 27)[None]
    with Products() as products:
        cache = half_model.encode_context(ids)
        projected = half_model.project_context(cache)
        half_model(ids[:, :9], context_cache=projected)
    many = {dtype for rows, dtype in products.seen if rows >= MANY_ROWS}
    assert many == {torch.float32}
    with Products() as one:
        half_model(ids[:, :1], context_cache=projected)
    # reading a weight in 16 bits is what counts
    assert (1, torch.bfloat16) in one.seen


@torch.no_grad()
def test_results_are_those_of_float32_rounded(half_model, emulated):
    ids = torch.arange(3, 27)[None]
    exact = half_model.float()
    wanted = exact.encode_context(ids).states["hidden"]
    half = half_model.to(torch.bfloat16)
    found = half.encode_context(ids).states["hidden"]
    assert found.dtype == torch.bfloat16
    error = (found.float() - wanted).norm() / wanted.norm()
    assert error < 0.03


def test_gradients_pass(emulated):
    torch.manual_seed(0)
    weights = [torch.randn(6, 6, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    rows = torch.randn(8, 6, dtype=torch.bfloat16)
    with WideProducts():
        functional.linear(functional.linear(rows, weights[0]), weights[1]).sum().backward()
    plain = [weight.detach().float().requires_grad_() for weight in weights]
    functional.linear(functional.linear(rows.float(), plain[0]), plain[1]).sum().backward()
    for weight, wanted in zip(weights, plain, strict=True):
        torch.testing.assert_close(weight.grad.float(), wanted.grad, atol=0.1, rtol=0.05)


def test_other_threads_are_left_alone(emulated):
    rows, weight, seen = torch.ones(8, 4, dtype=torch.bfloat16), torch.ones(4, 4, dtype=torch.bfloat16), []

    def other() -> None:
        with Products() as products:
            functional.linear(rows, weight)
        seen.extend(dtype for _, dtype in products.seen)

    with WideProducts():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [torch.bfloat16]


def test_the_choice(monkeypatch):
    half, full = torch.ones(2, dtype=torch.bfloat16), torch.ones(2)
    assert has_native_products(torch.float32)
    monkeypatch.setenv(wide_products.VARIABLE, "never")
    assert not isinstance(wide_products.wide_products(half), WideProducts)
    monkeypatch.setenv(wide_products.VARIABLE, "always")
    assert isinstance(wide_products.wide_products(half), WideProducts)
    assert not isinstance(wide_products.wide_products(full), WideProducts)
    assert not isinstance(wide_products.wide_products(half, num_rows=1), WideProducts)
    monkeypatch.setenv(wide_products.VARIABLE, "auto")
    native = has_native_products(torch.bfloat16)
    assert isinstance(wide_products.wide_products(half), WideProducts) != native
    monkeypatch.setenv(wide_products.VARIABLE, "sometimes")
    with pytest.raises(ValueError, match="must be auto, always or never, got 'sometimes'"):
        wide_products.wide_products(half)
