"""Transport of values and the alignment loss, as users write them: with the plan in memory."""

import itertools
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from objslot.benchmarks.peers import sinkhorn
from objslot.benchmarks.problem import Peer, Problem, settings_only, with_compiled
from objslot.ops.sinkhorn import reference


def log_domain(x: Tensor, y: Tensor, values: Tensor, eps: float, n_iters: int) -> Tensor:
    scores = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
    return sinkhorn.log_domain(scores, eps, n_iters) @ values


def exp_domain(x: Tensor, y: Tensor, values: Tensor, eps: float, n_iters: int) -> Tensor:
    scores = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
    return sinkhorn.exp_domain(scores, eps, n_iters) @ values


def definition_of_alignment(logits: Tensor, masks: Tensor, keys: Tensor, *, eps: float, n_iters: int) -> Tensor:
    """The loss pair by pair from its formula, with log-domain plans; float32 for the half types."""
    logits, masks, keys = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (logits, masks, keys))
    keys = F.normalize(keys, dim=-1)
    log_masks = logits.log_softmax(2)
    frames = logits.shape[1]
    total = 0
    for i in range(frames):
        for j in range(frames):
            if i == j:
                continue
            scores = keys[:, i] @ keys[:, j].mT
            plan, _ = reference.sinkhorn(scores, eps=eps, n_iters=n_iters)
            total = total - (plan * (log_masks[:, i].mT @ masks[:, j])).sum((1, 2)).mean()
    return total / (frames * (frames - 1))


def _flash_sinkhorn(problem: Problem):
    from flash_sinkhorn import SamplesLoss

    eps, n_iters = problem.settings["eps"], problem.settings["n_iters"]
    solve = SamplesLoss(
        loss="sinkhorn", blur=eps**0.5, half_cost=True, debias=False, use_epsilon_scaling=False, n_iters=n_iters
    )
    return lambda x, y, values: torch.stack([solve(one, other) for one, other in zip(x, y, strict=True)])


def plans_applied(logits: Tensor, masks: Tensor, keys: Tensor, *, eps: float, n_iters: int) -> Tensor:
    """The loss as somebody writes it who sees that it is linear in the masks: plan @ masks, and no matrix of
    cross-entropies. The rest is as in the authors' formulation."""
    frames = logits.shape[1]
    total = 0
    with torch.no_grad():
        keys = F.normalize(keys, dim=-1)
    log_masks = logits.log_softmax(2)
    for i, j in itertools.permutations(range(frames), 2):
        with torch.no_grad():
            plan = sinkhorn.exp_domain(keys[:, i] @ keys[:, j].mT, eps, n_iters)
            moved = masks[:, j] @ plan.mT
        total = total - (log_masks[:, i] * moved).sum((1, 2)).mean()
    return total / (frames * (frames - 1))


def _authors(problem: Problem):
    # A plan and a matrix of cross-entropies, positions by positions, for every ordered pair. Its module
    # is that of a whole training step, which needs more than the ops do.
    from objslot.benchmarks.peers import training

    return partial(training.semantic_alignment_loss, **problem.settings)


def _needs_cuda(problem: Problem) -> str | None:
    return None if problem.device.type == "cuda" else "runs on CUDA alone"


TRANSPORT = (
    *with_compiled("log domain", settings_only(log_domain)),
    Peer("exp domain, compiled", settings_only(exp_domain), compiled="default"),
    Peer(
        "flash-sinkhorn",
        _flash_sinkhorn,
        package="flash-sinkhorn",
        refuses=_needs_cuda,
        other="gives the transport cost of unit tokens and transports nothing",
    ),
)

ALIGNMENT = (
    *with_compiled("authors' formulation", _authors),
    *with_compiled("plans applied", settings_only(plans_applied), modes=("default",)),
)
