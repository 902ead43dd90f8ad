"""Entropic optimal transport between two discrete measures, by Sinkhorn's algorithm in the log domain."""

from torch import Tensor

from objslot.ops import _checks
from objslot.ops._arithmetic import compute_dtype
from objslot.ops.sinkhorn import autograd

__all__ = ["facts", "sinkhorn", "sinkhorn_potentials"]


def sinkhorn(
    scores: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    start: Tensor | None = None,
    eps: float = 0.05,
    n_iters: int = 3,
    tol: float | None = None,
    return_error: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The transport plan diag(x) exp(scores / eps) diag(y) with row sums near `a` and column sums `b`.

    Cuturi (2013), "Sinkhorn Distances", algorithm 1. An iteration sets the rows, then the columns, starting
    from y = 1, so the column sums are exact and the row sums converge. The result is that of the log domain:
    it neither overflows nor vanishes at a small eps.

    Args:
        scores: (..., n, m) similarities, larger is better (the negative of a cost); float16, bfloat16,
            float32 or float64. The half types are computed in float32.
        a: (..., n) mass of every row, not negative, in the dtype of the scores or of the arithmetic; leading
            dimensions broadcast. Default: 1 / n each. A row of mass zero is masked: its plan is zero, and so
            are the gradients of its scores and its mass.
        b: (..., m) mass of every column, likewise. Default: 1 / m each. The plan of a column of mass zero is
            zero, but as y starts from 1 everywhere its scores count when the rows are set for the first time.
        start: (..., m) potentials g of the columns to start from instead of y = 1, such as those that
            `sinkhorn_potentials` found for a problem like this one; natural logarithms, finite or -inf, in the
            dtype of the scores or of the arithmetic; leading dimensions broadcast. No f is needed: the rows
            are set first. A constant for the gradient, which is that of the iterations made from there.
        eps: strength of the entropy, in the unit of the scores.
        n_iters: iterations; with `tol` the most that are made.
        tol: an element of the batch stops as soon as its marginal error is not above `tol`.
        return_error: return (plan, error), where error (...) is the sum over the rows of |row sum - a|.
        backend: "reference", "cpu", "triton" or "cuda"; default: chosen for the call.

    Returns:
        The plan (..., n, m), contiguous, in the dtype of the scores. Its gradients for scores, a and b are
        those of the truncated iteration. A NaN spreads over its own element of the batch alone.

    Raises:
        TypeError or ValueError naming the argument; BackendError when `backend` cannot serve the call.
    """
    a, b, start = _checked(scores, a, b, start, eps, n_iters, tol)
    plan, _, _, error = autograd.sinkhorn(scores, a, b, start, eps, n_iters, tol, True, return_error, backend)
    return (plan, error) if return_error else plan


def sinkhorn_potentials(
    scores: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    start: Tensor | None = None,
    eps: float = 0.05,
    n_iters: int = 3,
    tol: float | None = None,
    return_error: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """The dual potentials of the plan that `sinkhorn` returns: plan = exp(f + g + scores / eps).

    Arguments and errors are those of `sinkhorn`. The plan is not stored.

    Returns:
        f (..., n) and g (..., m), natural logarithms without a unit, float32 for the half types, otherwise in
        the dtype of the scores; -inf where the mass is zero. With `return_error` also the error (...).
    """
    a, b, start = _checked(scores, a, b, start, eps, n_iters, tol)
    _, f, g, error = autograd.sinkhorn(scores, a, b, start, eps, n_iters, tol, False, return_error, backend)
    return (f, g, error) if return_error else (f, g)


def facts(
    scores: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    start: Tensor | None = None,
    eps: float = 0.05,
    n_iters: int = 3,
    tol: float | None = None,
    return_error: bool = False,
) -> dict:
    """What the choice of a backend looks at."""
    _checked(scores, a, b, start, eps, n_iters, tol)
    return autograd.facts(scores, n_iters, tol, start)


def _checked(scores, a, b, start, eps, n_iters, tol):
    """The marginals and the start, broadcast to the batch and in the arithmetic dtype."""
    _checks.tensor("scores", scores, "(..., n, m)")
    _checks.floating("scores", scores)
    if 0 in scores.shape[-2:]:
        raise ValueError(f"scores: expected at least one row and one column, got shape {tuple(scores.shape)}")
    _checks.positive("eps", eps)
    _checks.at_least("n_iters", n_iters, 1)
    if tol is not None:
        _checks.positive("tol", tol)
    if a is b is start is None:
        return None, None, None
    *batch, n, m = scores.shape
    return (
        marginal("a", a, scores, batch, n, "n"),
        marginal("b", b, scores, batch, m, "m"),
        first_potentials(start, scores, batch, m),
    )


def marginal(name: str, mass: Tensor | None, other: Tensor, batch: list[int], size: int, letter: str):
    """One number a row or column, checked against the sizes and the dtype of `other`, broadcast and in the
    arithmetic dtype."""
    if mass is None:
        return None
    layout = f"(..., {letter})"
    _checks.tensor(name, mass, layout)
    dtype = compute_dtype(other.dtype)
    if mass.dtype != dtype:
        _checks.like(name, mass, "the scores", other)
    if mass.device != other.device:
        raise ValueError(f"{name}: expected device {other.device}, that of the scores, got {mass.device}")
    _checks.expandable(name, mass, [*batch, size], layout)
    return mass.to(dtype).expand(*batch, size)


def first_potentials(start: Tensor | None, other: Tensor, batch: list[int], m: int) -> Tensor | None:
    """`start` checked and expanded like a marginal, without its history: it is a constant."""
    start = marginal("start", start, other, batch, m, "m")
    return None if start is None else start.detach()
