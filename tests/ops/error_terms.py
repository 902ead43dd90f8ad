"""How large the terms are that a gradient sums up: where they cancel, their rounding stays.

A gradient may be exactly zero because two large terms are equal. No kernel can know that: what it can be held to is
the rounding of the terms. All in float64, from the exact results.
"""

import torch
from torch import Tensor


def terms(case, inputs: list, results: list[Tensor], upper: list[Tensor]) -> tuple[list[Tensor], float]:
    """A bound of the terms of every gradient, in the order of the tensors given; and the largest exponent."""
    upper = [u.abs() for u in upper]
    bounds, exponent = globals()[f"_{case.op}"](case, inputs, results, upper)
    return [bound for bound, x in zip(bounds, inputs, strict=True) if x is not None], exponent


def _mass(x, size):
    return torch.tensor(1.0 / size, dtype=torch.float64) if x is None else x.clamp_min(1e-300)


def _divided(total: Tensor, mass: Tensor) -> Tensor:
    """Where the mass is zero the gradient is zero as well."""
    return torch.where(mass > 1e-299, total / mass, torch.zeros(()))


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _plan_terms(weighted: Tensor, a, b, eps: float):
    n, m = weighted.shape[-2:]
    sums = _divided(weighted.sum(-1), _mass(a, n)), _divided(weighted.sum(-2), _mass(b, m))
    return weighted / eps, *sums


def _sinkhorn(case, inputs, results, upper):
    scores, a, b = inputs
    eps = case.options["eps"]
    return list(_plan_terms(results[0] * upper[0], a, b, eps)), _largest(scores) / eps


def _sinkhorn_potentials(case, inputs, results, upper):
    scores, a, b = inputs
    eps, steps = case.options["eps"], case.options["n_iters"]
    n, m = scores.shape[-2:]
    f, g = (x.clamp_min(-1e300) for x in results)
    rows = (scores / eps + g.unsqueeze(-2)).softmax(-1)
    columns = (scores / eps + f.unsqueeze(-1)).softmax(-2)
    to_f = upper[0] + (columns * upper[1].unsqueeze(-2)).sum(-1)
    to_g = upper[1] + (rows * upper[0].unsqueeze(-1)).sum(-2)
    to_scores = (rows * to_f.unsqueeze(-1) + columns * to_g.unsqueeze(-2)) * (steps / eps)
    bounds = [to_scores, _divided(to_f * steps, _mass(a, n)), _divided(to_g * steps, _mass(b, m))]
    return bounds, _largest(scores) / eps


def _sinkhorn_transport(case, inputs, results, upper):
    x, y, values, a, b = inputs
    eps = case.options["eps"]
    lengths = [torch.ones(()), torch.ones(())]
    if case.options["similarity"] == "cosine":
        lengths = [t.norm(dim=-1, keepdim=True).clamp_min(1e-12) for t in (x, y)]
        x, y = x / lengths[0], y / lengths[1]
    from objslot.ops import sinkhorn

    scores = x @ y.mT
    plan = sinkhorn(scores, a, b, eps=eps, n_iters=case.options["n_iters"], backend="reference")
    to_scores, to_a, to_b = _plan_terms(plan * (upper[0] @ values.abs().mT), a, b, eps)
    to_x, to_y = to_scores @ y.abs(), to_scores.mT @ x.abs()
    if case.options["similarity"] == "cosine":
        to_x = to_x + (to_x * x.abs()).sum(-1, keepdim=True) * x.abs()
        to_y = to_y + (to_y * y.abs()).sum(-1, keepdim=True) * y.abs()
    size = max(_largest(x.abs() @ y.abs().mT), 1.0) / eps
    return [to_x / lengths[0], to_y / lengths[1], plan.mT @ upper[0], to_a, to_b], size


def _weight_terms(case, logits, mask, upper):
    """Of the logits and of the mask, and the weights."""
    shares = logits.softmax(-2)
    held = torch.ones(()) if mask is None else mask.unsqueeze(-2)
    raw = shares + case.options["eps"]
    total = (raw * held).sum(-1, keepdim=True)
    weights = torch.where(total > 0, raw * held / total.clamp_min(1e-300), torch.zeros(()))
    inner = upper + (upper * weights).sum(-1, keepdim=True)
    to_raw = torch.where(total > 0, inner / total.clamp_min(1e-300), torch.zeros(()))
    to_shares = to_raw * held
    to_logits = shares * (to_shares + (shares * to_shares).sum(-2, keepdim=True))
    return to_logits, (to_raw * raw).sum(-2), weights


def _slot_softmax(case, inputs, results, upper):
    logits, mask = inputs
    to_logits, to_mask, _ = _weight_terms(case, logits, mask, upper[0])
    return [to_logits, to_mask], _largest(logits)


def _slot_attention(case, inputs, results, upper):
    q, k, v, mask, bias = inputs
    values = k if v is None else v
    scale = case.options["scale"] or q.shape[-1] ** -0.5
    keys = k.unsqueeze(-3)
    logits = scale * q @ keys.mT + (0 if bias is None else bias.unsqueeze(-1))
    to_logits, to_mask, weights = _weight_terms(case, logits, mask, upper[0] @ values.abs().unsqueeze(-3).mT)
    if case.options["return_logits"]:
        to_logits = to_logits + upper[1]
    to_k = (to_logits.mT @ q.abs()).sum(-3) * scale
    to_v = (weights.mT @ upper[0]).sum(-3)
    if v is None:
        to_k, to_v = to_k + to_v, None
    exponent = _largest(scale * q.abs() @ keys.abs().mT) + (0 if bias is None else _largest(bias))
    return [to_logits @ keys.abs() * scale, to_k, to_v, to_mask, to_logits.sum(-1)], exponent


def _propagate(case, inputs, results, upper):
    query, keys, labels = inputs
    size = upper[0].norm() * max(_largest(labels), 1e-300) / case.options["temperature"]
    lengths = [x.norm(dim=-1).clamp_min(1e-12).min() if x.numel() else torch.ones(()) for x in (query, keys)]
    return [size / lengths[0], size / lengths[1], upper[0].norm()], 1 / case.options["temperature"]
