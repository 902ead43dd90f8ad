"""The core of slot attention: slots compete for positions and average the values of what they won."""

import torch
from torch import Tensor

from objslot.ops import _autocast, _checks
from objslot.ops.slot_attention import autograd
from objslot.ops.slot_softmax import check_sizes, prepare_mask

__all__ = ["facts", "slot_attention"]


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    eps: float = 1e-8,
    return_logits: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Slot attention's update in groups of slots (Locatello et al. 2020, Algorithm 1, lines 7 and 8).

        logits[g, i, j]  = scale * <q[g, i], k[j]>
        weights[g, i, j] = slot_softmax(logits, mask, eps=eps)
        updates[g, i]    = sum over j of weights[g, i, j] * v[j]

    The p slots of a group compete for the n positions; groups do not see one another and share k and v. Plain
    slot attention is g = 1.

    Args:
        q: (..., g, p, d), float16, bfloat16, float32 or float64. Half precision is computed in float32.
        k: (..., n, d), dtype and device of q.
        v: (..., n, e), dtype and device of q.
        mask: (..., g, n), weights of the positions, not negative; or bool. Where it is 0 the position is left out
            of the group, and its gradients are 0. A position that every group leaves out is not read at all: k
            and v may hold anything there. None counts every position once.
        scale: above 0; None means 1 / sqrt(d).
        eps: above 0, added to the softmax so that a slot that wins nowhere averages all positions.
        return_logits: also return the logits, zeros at positions that every group leaves out.
        backend: see `objslot.use_backend`; None leaves the choice to the context, the environment and the shapes.

    Leading dimensions broadcast. Under autocast, float32 arguments are cast as those of a matrix product.

    Returns:
        updates (..., g, p, e), dtype of q; zeros for a slot without any position. With `return_logits` also the
        logits (..., g, p, n). NaN stays inside its batch element.

    Gradients: q, k, v and mask, through both results, exact. Second derivatives go through the reference.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, scale or eps not above 0.
        BackendError: the backend asked for by name cannot serve the call.
    """
    _checks.tensor("q", q, "(..., g, p, d)")
    _checks.tensor("k", k, "(..., n, d)")
    _checks.tensor("v", v, "(..., n, e)")
    q, k, v = _autocast.cast(q, k, v)
    _checks.floating("q", q)
    _checks.like("k", k, "q", q)
    _checks.like("v", v, "q", q)
    check_sizes("q", q.shape, groups=-3, slots=-2, features=-1)
    check_sizes("v", v.shape, features=-1)
    positions = k.shape[-2]
    if scale is None:
        scale = q.shape[-1] ** -0.5
    _checks.positive("scale", scale)
    _checks.positive("eps", eps)
    batch = q.shape[:-3]
    if k.shape[:-2] != batch or v.shape[:-2] != batch:
        try:
            batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-2], v.shape[:-2])
        except RuntimeError:
            raise ValueError(
                f"q, k, v: expected leading dimensions that broadcast, got {tuple(q.shape[:-3])}, "
                f"{tuple(k.shape[:-2])} and {tuple(v.shape[:-2])}"
            ) from None
        q = q.expand(*batch, *q.shape[-3:])
    _checks.expandable("k", k, (*batch, positions, q.shape[-1]), "(..., n, d)")
    _checks.expandable("v", v, (*batch, positions, v.shape[-1]), "(..., n, e)")
    k = k.expand(*batch, *k.shape[-2:])
    v = v.expand(*batch, *v.shape[-2:])
    if mask is not None:
        mask = prepare_mask(mask, q, "q", (*batch, q.shape[-3], positions))
    updates, logits, _ = torch.ops.objslot.slot_attention(q, k, v, mask, scale, eps, return_logits, backend)
    return (updates, logits) if return_logits else updates


def facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    eps: float = 1e-8,
    return_logits: bool = False,
) -> dict:
    """What decides the backend of `slot_attention(q, k, v, mask)`."""
    return autograd.facts(q, k, v)
