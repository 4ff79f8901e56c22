"""Whatever names rows or contexts (lists, tensors, arrays, boolean masks) as plain integers, or a clear error."""

from collections.abc import Iterable

from torch import Tensor


def as_indices(indices: "Iterable[int] | Iterable[bool] | Tensor", count: int, name: str = "indices") -> list[int]:
    """`indices` as integers in [0, count - 1]; a mask of `count` booleans selects where it is true.

    Args:
        indices: a list, tuple, range, 1-D tensor or array, or any other iterable of integers or of booleans.
        count: of what there is to choose from.
        name: of the argument, for errors.

    Raises:
        TypeError: what cannot be iterated, or holds something that is neither an integer nor a boolean.
        ValueError: an index out of range, or a mask of another length.
    """
    if isinstance(indices, str | bytes | dict) or not isinstance(indices, Iterable):
        raise TypeError(f"`{name}` must be a list of integers or a mask of booleans, got {indices!r:.80}.")
    values = indices.tolist() if hasattr(indices, "tolist") else list(indices)
    if not isinstance(values, list):
        raise TypeError(f"`{name}` must be a list of integers or a mask of booleans, got the single value {values!r}.")
    # elements of tensors and arrays, as Python's numbers
    values = [value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value for value in values]
    masks = [isinstance(value, bool) for value in values]
    if values and all(masks):
        if len(values) != count:
            raise ValueError(f"a mask in `{name}` must have {count} values, one for each, got {len(values)}.")
        return [index for index, chosen in enumerate(values) if chosen]
    for value, is_mask in zip(values, masks, strict=True):
        if is_mask or not isinstance(value, int):
            raise TypeError(f"`{name}` must be integers, or all of them booleans, got {value!r:.80}.")
        if not 0 <= value < count:
            raise ValueError(f"context indices must be in [0, {count - 1}], got {value}.")
    return values
