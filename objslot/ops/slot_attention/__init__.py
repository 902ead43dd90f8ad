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
    v: Tensor | None,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-8,
    return_logits: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Slot attention's update in groups of slots (Locatello et al. 2020, Algorithm 1, lines 7 and 8).

        logits[g, i, j]  = scale * <q[g, i], k[j]> + bias[g, i]
        weights[g, i, j] = slot_softmax(logits, mask, eps=eps)
        updates[g, i]    = sum over j of weights[g, i, j] * v[j]

    The p slots of a group compete for the n positions; groups do not see one another and share k and v. Plain
    slot attention is g = 1. The attention is not stored, unless the logits are asked for; but for a backward pass the
    CPU kernels keep the softmax where it takes at most an eighth of the memory of k and v, dimensions that broadcast
    counted in full.

    Args:
        q: (..., g, p, d), float16, bfloat16, float32 or float64. Half precision is computed in float32.
        k: (..., n, d), dtype and device of q.
        v: (..., n, e), dtype and device of q; None means that the keys are the values too.
        mask: (..., g, n), weights of the positions, not negative; or bool. Where it is 0 the position is left out
            of the group, and its gradients are 0. A position that every group leaves out is not read at all: k
            and v may hold anything there. None counts every position once.
        bias: (..., g, p), dtype and device of q, added to every logit of a slot; None means 0.
        scale: above 0; None means 1 / sqrt(d).
        eps: above 0, added to the softmax so that a slot that wins nowhere averages all positions.
        return_logits: also return the logits, zeros at positions that every group leaves out.
        backend: see `objslot.use_backend`; None leaves the choice to the context, the environment and the shapes.

    Leading dimensions broadcast. Under autocast, float32 arguments are cast as those of a matrix product.

    Returns:
        updates (..., g, p, e), dtype of q; zeros for a slot without any position. With `return_logits` also the
        logits (..., g, p, n). NaN stays inside its batch element.

    Gradients: q, k, v, mask and bias, through both results, exact. Second derivatives go through the reference.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, scale or eps not above 0.
        BackendError: the backend asked for by name cannot serve the call.
    """
    _checks.tensor("q", q, "(..., g, p, d)")
    _checks.tensor("k", k, "(..., n, d)")
    if v is not None:
        _checks.tensor("v", v, "(..., n, e)")
    if bias is not None:
        _checks.tensor("bias", bias, "(..., g, p)")
    q, k, v, bias = _autocast.cast(q, k, v, bias)
    _checks.floating("q", q)
    _checks.like("k", k, "q", q)
    check_sizes("q", q.shape, groups=-3, slots=-2, features=-1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _checks.positive("scale", scale)
    _checks.positive("eps", eps)
    batch, positions = _batch(q, k, v), k.shape[-2]
    k = _checks.expanded("k", k, (*batch, positions, q.shape[-1]), "(..., n, d)")
    q = _checks.expanded("q", q, (*batch, *q.shape[-3:]), "(..., g, p, d)")
    if v is not None:
        _checks.like("v", v, "q", q)
        check_sizes("v", v.shape, features=-1)
        v = _checks.expanded("v", v, (*batch, positions, v.shape[-1]), "(..., n, e)")
    if bias is not None:
        _checks.like("bias", bias, "q", q)
        bias = _checks.expanded("bias", bias, q.shape[:-1], "(..., g, p)")
    if mask is not None:
        mask = prepare_mask(mask, q, "q", (*batch, q.shape[-3], positions))
    updates, logits = autograd.slot_attention(q, k, v, mask, bias, scale, eps, return_logits, backend)
    return (updates, logits) if return_logits else updates


def facts(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-8,
    return_logits: bool = False,
) -> dict:
    """What decides the backend of `slot_attention(q, k, v, mask)`."""
    return autograd.facts(q, k, v)


def _batch(q: Tensor, k: Tensor, v: Tensor | None) -> torch.Size:
    leading = [q.shape[:-3], k.shape[:-2]] + ([] if v is None else [v.shape[:-2]])
    if all(sizes == leading[0] for sizes in leading):
        return leading[0]
    try:
        return torch.broadcast_shapes(*leading)
    except RuntimeError:
        shown = ", ".join(str(tuple(sizes)) for sizes in leading)
        raise ValueError(f"q, k, v: expected leading dimensions that broadcast, got {shown}") from None
