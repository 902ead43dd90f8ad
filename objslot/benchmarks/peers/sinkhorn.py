"""Sinkhorn as users write it, and as POT and GeomLoss offer it. Uniform marginals throughout."""

import math

import torch
from torch import Tensor

from objslot.benchmarks.problem import Peer, Problem, settings_only, with_compiled


def log_domain(scores: Tensor, eps: float, n_iters: int) -> Tensor:
    """Alternating log-sum-exp."""
    f, g, logits = _potentials(scores, eps, n_iters)
    return (logits + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()


def potentials(scores: Tensor, eps: float, n_iters: int) -> tuple[Tensor, Tensor]:
    return _potentials(scores, eps, n_iters)[:2]


def exp_domain(scores: Tensor, eps: float, n_iters: int) -> Tensor:
    """exp(scores / eps) with rows and columns normalised in turn, as in SwAV and its descendants."""
    n, m = scores.shape[-2:]
    plan = torch.exp(scores / eps)
    for _ in range(n_iters):
        plan = plan / (plan.sum(-1, keepdim=True) * n)
        plan = plan / (plan.sum(-2, keepdim=True) * m)
    return plan


def _potentials(scores, eps, n_iters):
    n, m = scores.shape[-2:]
    logits = scores / eps
    g = torch.zeros_like(logits[..., 0, :])
    for _ in range(n_iters):
        f = -math.log(n) - torch.logsumexp(logits + g.unsqueeze(-2), -1)
        g = -math.log(m) - torch.logsumexp(logits + f.unsqueeze(-1), -2)
    return f, g, logits


def _pot(function: str):
    def make(problem: Problem):
        from ot import batch

        solve = getattr(batch, function)
        eps, n_iters = problem.settings["eps"], problem.settings["n_iters"]
        n, m = problem.tensors[0].shape[-2:]
        a, b = (problem.tensors[0].new_full((problem.tensors[0].shape[0], size), 1 / size) for size in (n, m))

        def call(scores: Tensor) -> Tensor:
            affinity = scores / eps
            if function == "bregman_projection_batch":
                affinity = affinity.exp()
            # A tolerance of 0 keeps POT from stopping before the iterations are made.
            return solve(affinity, a, b, max_iter=n_iters, tol=0.0, grad="autodiff")["T"]

        return call

    return make


def _geomloss(problem: Problem):
    from geomloss import ot

    eps, n_iters = problem.settings["eps"], problem.settings["n_iters"]
    return lambda scores: ot.solve_batch(-scores, reg=eps, max_iter=n_iters).plan


PLANS = (
    *with_compiled("log domain", settings_only(log_domain)),
    Peer("exp domain, eager", settings_only(exp_domain)),
    Peer("exp domain, compiled", settings_only(exp_domain), compiled="default"),
    Peer("POT log", _pot("bregman_log_projection_batch"), package="POT"),
    Peer("POT exp", _pot("bregman_projection_batch"), package="POT"),
    Peer(
        "GeomLoss",
        _geomloss,
        package="geomloss",
        other="averages the row and the column update of each iteration and starts from a large eps",
    ),
)

POTENTIALS = with_compiled("log domain", settings_only(potentials))
