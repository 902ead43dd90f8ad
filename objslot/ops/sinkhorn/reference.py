"""The definition of Sinkhorn's algorithm in the log domain, in plain PyTorch.

Cuturi (2013), "Sinkhorn Distances", with the scalings kept as logarithms (Peyre and Cuturi, "Computational
Optimal Transport", section 4.4). Everything is differentiable, any number of times, and runs on any device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from objslot.ops._arithmetic import compute_dtype

_NOTHING = float("-inf")


class Scalings(NamedTuple):
    """The potentials after every iteration, and how the iteration ended.

    f: (n_iters, ..., n) and g: (n_iters, ..., m), -inf where the marginal holds no mass; after an element has
    stopped its last potentials are repeated. count: (...) int64, the iterations that each element made.
    error: (...), the sum over the rows of |row sum of the plan - a|.
    """

    f: Tensor
    g: Tensor
    count: Tensor
    error: Tensor


def scalings(
    scores: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    start: Tensor | None = None,
    *,
    eps: float,
    n_iters: int,
    tol: float | None = None,
) -> Scalings:
    """Potentials of `n_iters` iterations, rows and then columns, from g = `start` (..., m), a constant for the
    gradient, or from g = 0; with `tol` at most as many."""
    n, m = scores.shape[-2:]
    batch = scores.shape[:-2]
    logits = scores.to(compute_dtype(scores.dtype)) / eps
    a = _marginal(a, logits, batch, n)
    b = _marginal(b, logits, batch, m)
    log_a, log_b = _log(a), _log(b)

    f = logits.new_zeros(*batch, n)
    g = logits.new_zeros(*batch, m) if start is None else start.detach().to(logits.dtype).expand(*batch, m)
    running = torch.ones(batch, dtype=torch.bool, device=scores.device)
    count = torch.zeros(batch, dtype=torch.int64, device=scores.device)
    error = logits.new_full(batch, float("inf"))
    history_f, history_g = [], []
    for _ in range(n_iters):
        new_f = _potential(log_a, _logsumexp(logits + g.unsqueeze(-2), -1))
        f = torch.where(running.unsqueeze(-1), new_f, f)
        new_g = _potential(log_b, _logsumexp(logits + f.unsqueeze(-1), -2))
        g = torch.where(running.unsqueeze(-1), new_g, g)
        history_f.append(f)
        history_g.append(g)
        count = count + running
        if tol is not None or len(history_f) == n_iters:
            error = (_exponentiate(logits, f, g).sum(-1) - a).abs().sum(-1).detach()
        if tol is not None:
            # A NaN error is not under any tolerance, but no further iteration would mend it.
            running = running & (error > tol)
    return Scalings(torch.stack(history_f), torch.stack(history_g), count, error)


def plan(scores: Tensor, f: Tensor, g: Tensor, *, eps: float) -> Tensor:
    """exp(f + g + scores / eps), in the dtype of the scores; zero where a potential is -inf."""
    logits = scores.to(compute_dtype(scores.dtype)) / eps
    return _exponentiate(logits, f, g).to(scores.dtype)


def sinkhorn(
    scores: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    start: Tensor | None = None,
    *,
    eps: float = 0.05,
    n_iters: int = 3,
    tol: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The plan (..., n, m) and the marginal error (...) it reached; arguments as in `objslot.sinkhorn`."""
    found = scalings(scores, a, b, start, eps=eps, n_iters=n_iters, tol=tol)
    return plan(scores, found.f[-1], found.g[-1], eps=eps), found.error


def _marginal(mass: Tensor | None, logits: Tensor, batch: torch.Size, size: int) -> Tensor:
    if mass is None:
        return logits.new_full((size,), 1.0 / size).expand(*batch, size)
    return mass.to(logits.dtype).expand(*batch, size)


def _log(mass: Tensor) -> Tensor:
    # The inner `where` keeps 1 / 0 out of the gradient: a masked entry has gradient zero.
    return torch.where(mass == 0, _NOTHING, torch.where(mass == 0, 1.0, mass).log())


def _logsumexp(logits: Tensor, dim: int) -> Tensor:
    # torch.logsumexp has no finite second derivative where all the terms are -inf.
    top = logits.detach().amax(dim, keepdim=True)
    top = torch.where(top == _NOTHING, 0.0, top)
    total = (logits - top).exp().sum(dim)
    empty = total == 0
    return torch.where(empty, _NOTHING, torch.where(empty, 1.0, total).log() + top.squeeze(dim))


def _potential(log_mass: Tensor, lse: Tensor) -> Tensor:
    nothing = (log_mass == _NOTHING) | (lse == _NOTHING)
    return torch.where(nothing, _NOTHING, torch.where(nothing, 0.0, log_mass) - torch.where(nothing, 0.0, lse))


def _exponentiate(logits: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return (logits + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()
