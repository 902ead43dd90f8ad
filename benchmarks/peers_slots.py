"""What a user would pick instead of the ops and modules on slots, in plain PyTorch and scipy.

Every function computes what its counterpart in objslot does, in the way that is usual: the benchmarks time them
eager and compiled, and compare results before they do.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn


def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """`objslot.slot_attention`: q (B, g, p, d), k (B, n, d), v (B, n, e), mask (B, g, n) -> (B, g, p, e)."""
    batch, groups, slots, width = q.shape
    logits = (q.flatten(1, 2) @ k.mT * width**-0.5).unflatten(1, (groups, slots))
    weights = logits.softmax(-2) + eps
    if mask is not None:
        weights = weights * mask.unsqueeze(-2)
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights.flatten(1, 2) @ v).unflatten(1, (groups, slots))


def slot_softmax(logits: Tensor, mask: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """`objslot.slot_softmax`: logits (..., g, p, n), mask (..., g, n)."""
    weights = logits.softmax(-2) + eps
    if mask is not None:
        weights = weights * mask.unsqueeze(-2)
    return weights / weights.sum(-1, keepdim=True)


class TwoStages(nn.Module):
    """Semantics, then instances of every semantics, as the authors of SMTC wrote their loops.

    Both stages project the inputs to keys and values once, normalise what the softmax gives over the positions,
    detach the slots before the last iteration, and store every attention. The parameters are named as those of
    `objslot.nn.SemanticSlotAttention`, so that its state dict loads.
    """

    def __init__(self, semantics: int, width: int, iterations: int = 3, eps: float = 1e-8):
        super().__init__()
        self.iterations, self.eps, self.scale = iterations, eps, width**-0.5
        self.mu = nn.Parameter(torch.randn(semantics, width))
        self.log_sigma = nn.Parameter(torch.zeros(semantics, width))
        self.norm_inputs, self.norm_slots, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        hidden = max(width, 128)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, n, D), noise (N, P, D) -> slots (B, N, D) and (B, N, P, D), logits (B, N, n) and (B, N, P, n)."""
        x = self.norm_inputs(x)
        k, v = self.key(x), self.value(x)
        initial = slots = self.mu.expand(len(x), -1, -1)
        for iteration in range(self.iterations):
            if iteration == self.iterations - 1:
                slots = slots.detach() - initial.detach() + initial
            q = self.query(self.norm_slots(slots))
            semantic_logits = torch.einsum("bnd,bjd->bnj", q, k) * self.scale
            attention = semantic_logits.softmax(1) + self.eps
            attention = attention / attention.sum(-1, keepdim=True)
            slots = slots + torch.einsum("bnj,bjd->bnd", attention, v)
            slots = slots + self.mlp(self.norm_mlp(slots))
        semantic_slots, mask = slots, semantic_logits.softmax(1)

        drawn = self.mu.unsqueeze(1) + self.log_sigma.exp().unsqueeze(1) * noise
        initial = slots = drawn.expand(len(x), -1, -1, -1)
        for iteration in range(self.iterations):
            if iteration == self.iterations - 1:
                slots = slots.detach() - initial.detach() + initial
            q = self.query(self.norm_slots(slots))
            instance_logits = torch.einsum("bnpd,bjd->bnpj", q, k) * self.scale
            attention = (instance_logits.softmax(2) + self.eps) * mask.unsqueeze(2)
            attention = attention / attention.sum(-1, keepdim=True)
            slots = slots + torch.einsum("bnpj,bjd->bnpd", attention, v)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return semantic_slots, slots, semantic_logits, instance_logits


def scipy_loop(scores: Tensor) -> Tensor:
    """`objslot.ops.assign.assign`, one problem (p, q) of (..., p, q) at a time, an index tensor for each."""
    rows = []
    for problem in scores.flatten(0, -3):
        _, columns = linear_sum_assignment(problem.detach().cpu().numpy(), maximize=True)
        rows.append(torch.as_tensor(columns, dtype=torch.int64, device=scores.device))
    return torch.stack(rows).reshape(scores.shape[:-1])
