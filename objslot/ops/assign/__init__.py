"""Exact assignment of rows to columns, for many small problems at once."""

import torch
from torch import Tensor

from objslot.ops import _checks
from objslot.ops.assign import autograd

__all__ = ["assign", "facts"]


def assign(scores: Tensor, *, backend: str | None = None) -> Tensor:
    """The assignment of every row to a column of its own that maximises the sum of scores.

    Problems with at most 5 columns are solved by enumeration, on the device of the scores and without a copy to
    the host; larger ones by shortest augmenting paths (Jonker and Volgenant 1987), in float64.

    Args:
        scores: (..., p, q), 1 <= p <= q; float16, bfloat16, float32 or float64. -inf forbids a pair.
        backend: see `objslot.use_backend`; None leaves the choice to the context, the environment and the shapes.

    Returns:
        index (..., p), int64: row i is assigned to column index[i]. Of several best assignments the
        lexicographically smallest row of indices, the same on every backend; above 5 columns that counts ties
        that float64 arithmetic sees as ties. A problem that holds NaN or +inf, or that has no allowed assignment,
        gives 0, 1, ..., p - 1. There is no gradient.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, among them more rows than columns.
        BackendError: the backend asked for by name cannot serve the call.
    """
    _checks.tensor("scores", scores, "(..., p, q)")
    _checks.floating("scores", scores)
    rows, columns = scores.shape[-2:]
    if not 1 <= rows <= columns:
        raise ValueError(
            f"scores: expected shape (..., p, q) with 1 <= p <= q, got {tuple(scores.shape)}; transpose it to "
            "assign columns to rows"
        )
    return torch.ops.objslot.assign(scores, backend)


def facts(scores: Tensor) -> dict:
    """What decides the backend of `assign(scores)`."""
    return autograd.facts(scores)
