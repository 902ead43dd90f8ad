"""The definition of Sinkhorn transport in plain PyTorch: it stores the scores and the plan."""

import torch
from torch import Tensor

from objslot.ops._arithmetic import SHORTEST, compute_dtype
from objslot.ops.sinkhorn import reference as sinkhorn_reference


def normalise(tokens: Tensor) -> Tensor:
    """Tokens (..., n, d) divided by their Euclidean length; zero, without a gradient, where they are too short."""
    squares = tokens.square().sum(-1, keepdim=True)
    # Clamped before the root: the derivative of the root at zero is infinite.
    unit = tokens / squares.clamp_min(SHORTEST**2).sqrt()
    return torch.where(squares < SHORTEST**2, 0, unit)


def similarity_scores(x: Tensor, y: Tensor, similarity: str) -> Tensor:
    """Scores (..., n, m) of x (..., n, d) and y (..., m, d), in the arithmetic dtype."""
    dtype = compute_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if similarity == "cosine":
        x, y = normalise(x), normalise(y)
    return x @ y.mT


def sinkhorn_transport(*tensors: Tensor | None, **settings) -> Tensor:
    """plan @ values (..., n, c); arguments as in `transport`."""
    return transport(*tensors, **settings)[0]


def transport(
    x: Tensor,
    y: Tensor,
    values: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    start: Tensor | None = None,
    *,
    eps: float = 0.05,
    n_iters: int = 3,
    tol: float | None = None,
    similarity: str = "cosine",
) -> tuple[Tensor, Tensor]:
    """plan @ values (..., n, c) and the marginal error (...); arguments as in `objslot.sinkhorn_transport`."""
    scores = similarity_scores(x, y, similarity)
    plan, error = sinkhorn_reference.sinkhorn(scores, a, b, start, eps=eps, n_iters=n_iters, tol=tol)
    return (plan @ values.to(plan.dtype)).to(values.dtype), error


def alignment(
    tokens: Tensor,
    values: Tensor,
    masses: Tensor | None = None,
    *,
    eps: float = 0.05,
    n_iters: int = 3,
    similarity: str = "cosine",
) -> Tensor:
    """Sum over j != i of plan_ij @ values_j, (..., t, n, c); arguments as in `alignment` of the op."""
    frames = range(tokens.shape[-3])
    rows = []
    for i in frames:
        row = torch.zeros_like(values[..., i, :, :])
        for j in frames:
            if i != j:
                row = row + sinkhorn_transport(
                    tokens[..., i, :, :],
                    tokens[..., j, :, :],
                    values[..., j, :, :],
                    None if masses is None else masses[..., i, :],
                    None if masses is None else masses[..., j, :],
                    eps=eps,
                    n_iters=n_iters,
                    similarity=similarity,
                )
        rows.append(row)
    return torch.stack(rows, -3)
