"""Sinkhorn transport of values between two sets of tokens: the plan is applied and never returned."""

import torch
from torch import Tensor

from objslot.ops import _checks
from objslot.ops._arithmetic import compute_dtype
from objslot.ops.sinkhorn import first_potentials, marginal
from objslot.ops.transport import autograd

__all__ = ["alignment", "facts", "sinkhorn_transport"]

SIMILARITIES = ("cosine", "dot")


def sinkhorn_transport(
    x: Tensor,
    y: Tensor,
    values: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    start: Tensor | None = None,
    eps: float = 0.05,
    n_iters: int = 3,
    tol: float | None = None,
    similarity: str = "cosine",
    return_error: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """plan @ values, for the plan of `objslot.sinkhorn` on the similarities of x and y.

    Neither scores nor plan outlive the call, nor are they kept for the backward pass, which makes them again.
    On the CPU they exist for one element of the batch and thread at a time; the reference backend makes all of them.

    Args:
        x: (..., n, d) tokens; float16, bfloat16, float32 or float64, half types computed in float32.
        y: (..., m, d) tokens, same leading dimensions and dtype.
        values: (..., m, c), same leading dimensions and dtype.
        a, b, start, eps, n_iters, tol, backend: as in `objslot.sinkhorn`; leading dimensions of a, b and start
            broadcast.
        similarity: "cosine" (a token shorter than 1e-12 has cosine 0 with everything, and no gradient) or "dot".
        return_error: return (moved values, error), where error (...) is the sum over the rows of
            |row sum of the plan - a|.

    Returns:
        (..., n, c) in the dtype of the values, with exact gradients for x, y, values, a and b.

    Raises:
        TypeError or ValueError naming the argument; BackendError when `backend` cannot serve the call.
    """
    a, b, start = _checked(x, y, values, a, b, start, eps, n_iters, tol, similarity)
    moved, error = autograd.transport(
        x, y, values, a, b, start, eps, n_iters, tol, similarity, return_error, backend
    )
    return (moved, error) if return_error else moved


def alignment(
    tokens: Tensor,
    values: Tensor,
    masses: Tensor | None = None,
    *,
    eps: float = 0.05,
    n_iters: int = 3,
    similarity: str = "cosine",
    backend: str | None = None,
) -> Tensor:
    """For every frame i of a clip the sum over the other frames j of plan_ij @ values_j.

    plan_ij is the plan of `objslot.sinkhorn` on the similarities of frame i (rows) and frame j (columns),
    with the masses of the two frames as marginals. Each similarity matrix is made once and serves both
    directions.

    Args:
        tokens: (..., t, n, d) tokens of t frames.
        values: (..., t, n, c), same leading dimensions, and the dtype of the tokens or, for half tokens, float32.
        masses: (..., t, n) mass of every token, not negative; default 1 / n each.
        eps, n_iters, similarity, backend: as in `sinkhorn_transport`.

    Returns:
        (..., t, n, c) in the dtype of the values; zeros where t is 1. Differentiable in every tensor.

    Raises:
        TypeError or ValueError naming the argument; BackendError when `backend` cannot serve the call.
    """
    _checks.tensor("tokens", tokens, "(..., t, n, d)")
    _checks.tensor("values", values, "(..., t, n, c)")
    *batch, frames, n, _ = tokens.shape
    masses = marginal("masses", masses, tokens, [*batch, frames], n, "n")
    _checked(tokens, tokens, values, None, None, None, eps, n_iters, None, similarity, wide_values=True)
    tensors = (tokens, values, masses)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _alignment_by_pairs(*tensors, eps, n_iters, similarity, backend)
    return autograd.alignment(*tensors, eps, n_iters, similarity, backend)


def _alignment_by_pairs(tokens, values, masses, eps, n_iters, similarity, backend):
    """`alignment` in one differentiable transport of all ordered pairs."""
    frames, tokens = tokens.shape[-3], tokens.to(values.dtype)
    pairs = [(i, j) for i in range(frames) for j in range(frames) if i != j]
    rows = torch.tensor([i for i, _ in pairs], dtype=torch.int64, device=tokens.device)
    columns = torch.tensor([j for _, j in pairs], dtype=torch.int64, device=tokens.device)
    moved = sinkhorn_transport(
        tokens.index_select(-3, rows),
        tokens.index_select(-3, columns),
        values.index_select(-3, columns),
        None if masses is None else masses.index_select(-2, rows),
        None if masses is None else masses.index_select(-2, columns),
        eps=eps,
        n_iters=n_iters,
        similarity=similarity,
        backend=backend,
    )
    return torch.zeros_like(values).index_add(-3, rows, moved)


def facts(
    x: Tensor,
    y: Tensor,
    values: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    start: Tensor | None = None,
    eps: float = 0.05,
    n_iters: int = 3,
    tol: float | None = None,
    similarity: str = "cosine",
    return_error: bool = False,
) -> dict:
    """What the choice of a backend looks at."""
    _checked(x, y, values, a, b, start, eps, n_iters, tol, similarity)
    return autograd.facts(x, y, values, n_iters, tol, start)


def _checked(x, y, values, a, b, start, eps, n_iters, tol, similarity, wide_values=False):
    """The marginals and the start, broadcast to the batch and in the arithmetic dtype.

    With `wide_values` the values may have that dtype too.
    """
    _checks.tensor("x", x, "(..., n, d)")
    _checks.tensor("y", y, "(..., m, d)")
    _checks.tensor("values", values, "(..., m, c)")
    _checks.floating("x", x)
    _checks.like("y", y, "x", x)
    if not (wide_values and values.dtype == compute_dtype(x.dtype) and values.device == x.device):
        _checks.like("values", values, "x", x)
    *batch, n, d = x.shape
    m, c = y.shape[-2], values.shape[-1]
    _checks.shape("y", y, (*batch, m, d), "(..., m, d)")
    _checks.shape("values", values, (*batch, m, c), "(..., m, c)")
    for name, size in (("x", n), ("y", m)):
        if size == 0 or d == 0:
            raise ValueError(f"{name}: expected at least one token and one feature, got size 0")
    _checks.positive("eps", eps)
    _checks.at_least("n_iters", n_iters, 1)
    if tol is not None:
        _checks.positive("tol", tol)
    _checks.choice("similarity", similarity, SIMILARITIES)
    return (
        marginal("a", a, x, batch, n, "n"),
        marginal("b", b, x, batch, m, "m"),
        first_potentials(start, x, batch, m),
    )
