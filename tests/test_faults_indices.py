"""Indices name what they say: masks select by mask, and nothing is rounded to an integer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_xcllama import ContextCache
from modeling_xcllama.indices import as_indices


def make_cache(documents: int = 4) -> ContextCache:
    hidden = torch.arange(documents * 2.0)[:, None].repeat(1, 8)
    offsets = tuple(range(0, 2 * documents + 1, 2))
    return ContextCache({"hidden": hidden}, offsets, torch.arange(2 * documents).int(), "f" * 64)


INTEGERS = {
    "list": [2, 0, 2],
    "tuple": (2, 0, 2),
    "iterator": lambda: iter([2, 0, 2]),
    "int64": torch.tensor([2, 0, 2]),
    "int32": torch.tensor([2, 0, 2], dtype=torch.int32),
    "uint8": torch.tensor([2, 0, 2], dtype=torch.uint8),
    "numpy": np.array([2, 0, 2]),
    "numpy_elements": [np.int32(2), np.int64(0), 2],
    "tensor_elements": [torch.tensor(2), 0, torch.tensor(2)],
    "strided": torch.tensor([2, 9, 0, 9, 2])[::2],
}
MASKS = {
    "list": [True, False, True, False],
    "tensor": torch.tensor([True, False, True, False]),
    "numpy": np.array([True, False, True, False]),
    "numpy_elements": [np.True_, np.False_, np.True_, np.False_],
    "tensor_elements": list(torch.tensor([True, False, True, False])),
}
WRONG = {
    "float": [1.7],
    "whole_float": [1.0],
    "float_tensor": torch.tensor([1.0]),
    "float_array": np.array([0.5]),
    "text": "01",
    "texts": ["0"],
    "bytes": b"\x00",
    "none": None,
    "none_inside": [None],
    "one_integer": 1,
    "one_tensor": torch.tensor(1),
    "complex": [1j],
    "nested": [[[0]]],
    "two_dimensions": torch.tensor([[0, 1]]),
    "mixed": [True, 1, 0, 0],
    "dict": {0: 1},
}


@pytest.fixture(scope="module")
def model(make_sharp_model):
    return make_sharp_model()


@pytest.fixture(scope="module", params=["cache", "projected"])
def rows(request, model) -> object:
    """Four rows of a cache, or of its keys and values."""
    cache = model.encode_context(torch.arange(3, 19).view(4, 4))
    return cache if request.param == "cache" else model.project_context(cache)


def first_tokens(rows) -> list[int]:
    cache = rows if isinstance(rows, ContextCache) else rows.cache
    return [int(cache.row_token_ids(row)[0]) for row in range(len(rows))]


@pytest.mark.parametrize("indices", INTEGERS.values(), ids=INTEGERS.keys())
def test_integers(rows, indices):
    fresh = indices if not callable(indices) else indices()
    selected = rows.select(fresh)
    assert first_tokens(selected) == [11, 3, 11]
    if not isinstance(rows, ContextCache):
        assert selected.rows.context_index == (2, 0, 2)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks(rows, mask):
    assert first_tokens(rows.select(mask)) == [3, 11]
    with pytest.raises(ValueError, match="mask in `indices` must have 4 values, one for each, got 3"):
        rows.select(mask[:3])
    with pytest.raises(ValueError, match="at least one context"):
        rows.select([False] * 4)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_index(rows, wrong):
    with pytest.raises(TypeError, match="must be"):
        rows.select(wrong)


@pytest.mark.parametrize("wrong", [[4], [-1], [10**30], torch.tensor([-4])], ids=str)
def test_out_of_range(rows, wrong):
    with pytest.raises(ValueError, match=r"must be in \[0, 3\], got"):
        rows.select(wrong)


def test_join_takes_the_same():
    cache = make_cache()
    assert cache.join([[1, 0], torch.tensor([True, False, False, True]), np.array([], dtype=int)]).rows == (
        (1, 0),
        (0, 3),
        (),
    )
    assert cache.join(torch.tensor([[0, 1], [2, 3]])).rows == ((0, 1), (2, 3))
    assert cache.join(torch.eye(4, dtype=torch.bool)).rows == ((0,), (1,), (2,), (3,))
    for wrong in ([[1.7]], [0, 1], ["01"], [[True, False]], [[True, 1]], [None]):
        with pytest.raises((TypeError, ValueError), match="`groups`"):
            cache.join(wrong)


def test_offsets_and_rows_of_a_cache():
    states, ids = {"hidden": torch.zeros(2, 8)}, torch.zeros(2).int()
    assert ContextCache(states, torch.tensor([0, 2]), ids, "f").offsets == (0, 2)
    assert ContextCache(states, (0, 2), ids, "f", [[np.int64(0)]]).rows == ((0,),)
    for offsets, rows in (((0, 1.7, 2), None), ((0, 2), ((0.0,),)), (("0", "2"), None)):
        with pytest.raises(TypeError, match="integer"):
            ContextCache(states, offsets, ids, "f", rows)


def test_ids_and_masks_of_contexts(model):
    ids = torch.arange(3, 9)[None]
    for wrong in (ids.float(), ids.bool()):
        with pytest.raises(ValueError, match="must be integers, got"):
            model.encode_context(wrong)
    for mask in (ids, torch.full(ids.shape, 0.5), torch.full(ids.shape, -1e9), torch.full(ids.shape, torch.nan)):
        with pytest.raises(ValueError, match="must be 1 at tokens and 0 at padding"):
            model.encode_context(ids, mask)
    for mask in (torch.ones_like(ids), torch.ones(ids.shape), torch.ones(ids.shape, dtype=torch.bool)):
        assert model.encode_context(ids.int(), mask).lengths == [6]
    for wrong in (torch.tensor([[97]]), torch.tensor([[-1]])):
        with pytest.raises(ValueError, match=r"must lie in \[0, 96\]"):
            model.encode_context(wrong)


def test_selecting_looks_at_the_chosen_rows_alone(monkeypatch):
    cache, checked = make_cache(1000), []
    monkeypatch.setattr(ContextCache, "__post_init__", lambda self: checked.append(self))
    assert cache.select([5]).join([[0]]).select([0]).lengths == [2]
    assert ContextCache.concat([cache.select([1]), cache.select([2])]).rows == ((1,), (2,))
    assert checked == []


@given(
    st.lists(st.one_of(st.integers(-2, 6), st.booleans(), st.floats(), st.none(), st.text(max_size=2)), max_size=6),
    st.sampled_from([list, tuple, iter, np.array, lambda values: torch.tensor(values)]),
)
def test_any_list(values, container):
    """Right or refused: what comes back are integers that the caller wrote, or the places of true booleans."""
    try:
        given_values = container(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return
    try:
        found = as_indices(given_values, 5)
    except (TypeError, ValueError):
        return
    if values and all(type(value) is bool for value in values):
        assert found == [place for place, value in enumerate(values) if value]
    else:
        assert all(type(value) in (int, bool) for value in values)
        assert found == [int(value) for value in values]
        assert all(0 <= value < 5 for value in found)
