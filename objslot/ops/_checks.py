"""Checks of arguments: each raises one line that names the argument, what came and what was expected.

All but `non_negative` look at shapes and types alone, so torch.compile traces through them.
"""

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, value: object, layout: str) -> None:
    """`value` is a tensor with at least the trailing dimensions of `layout`, e.g. "(..., n, m)"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {layout}, got {type(value).__name__}")
    least = layout.count(",")
    if value.dim() < least:
        count = f"{least} dimension{'s' * (least != 1)}"
        raise ValueError(f"{name}: expected at least {count}, {layout}, got {_shape(value.shape)}")


def floating(name: str, value: Tensor) -> None:
    """`value` has one of the four dtypes that the ops compute with."""
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {_dtype(value.dtype)}")


def like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` has the dtype and the device of `other`."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name}: expected {_dtype(other.dtype)}, the dtype of {other_name}, got {_dtype(value.dtype)}"
        )
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device}, that of {other_name}, got {value.device}")


def shape(name: str, value: Tensor, expected: Sequence[int], layout: str) -> None:
    """`value` has exactly the sizes `expected`, called `layout` in the message."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {layout} = {_shape(expected)}, got {_shape(value.shape)}")


def expandable(name: str, value: Tensor, expected: Sequence[int], layout: str) -> None:
    """The trailing dimensions of `layout` have the sizes `expected`; leading ones broadcast to `expected`."""
    trailing = layout.count(",")
    sizes, batch = value.shape, len(expected) - trailing
    offset = len(expected) - len(sizes)
    fits = 0 <= offset <= batch and all(
        size == wanted or (size == 1 and index + offset < batch)
        for index, (size, wanted) in enumerate(zip(sizes, expected[max(offset, 0) :], strict=True))
    )
    if not fits:
        raise ValueError(
            f"{name}: expected shape {layout} = {_shape(expected)}, or one that broadcasts to it in its "
            f"leading dimensions, got {_shape(sizes)}"
        )


def expanded(name: str, value: Tensor, expected: Sequence[int], layout: str) -> Tensor:
    """`value`, checked by `expandable`, in the shape `expected`."""
    if value.shape == tuple(expected):
        # Nothing for autograd to record.
        return value
    expandable(name, value, expected, layout)
    return value.expand(expected)


def positive(name: str, value: object) -> None:
    """`value` is a finite real number above zero."""
    if type(value) is float and 0 < value < float("inf"):
        return
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number above 0, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def at_least(name: str, value: object, least: int) -> None:
    """`value` is an integer not below `least`."""
    if type(value) is int and value >= least:
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def choice(name: str, value: object, options: Sequence[str]) -> None:
    """`value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")


def non_negative(name: str, value: Tensor) -> None:
    """No entry of `value` is negative (NaN passes). Reads the values: call it where they are at hand."""
    if value.numel() and bool((value < 0).any()):
        raise ValueError(f"{name}: expected no negative entry, got {float(value.min()):g}")


def _shape(sizes: Sequence[int]) -> str:
    return f"({', '.join(map(str, sizes))}{',' * (len(sizes) == 1)})"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
