"""The definition of slot_attention in plain PyTorch: any device, any floating dtype."""

from torch import Tensor

from objslot.ops.slot_softmax.reference import (
    arithmetic,
    masked_softmax,
    reciprocal_or_zero,
    softmax_gradients,
)


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Updates (..., g, p, e), logits (..., g, p, n) and the mass (..., g, p) of every slot.

    All three in the dtype of the arithmetic: the caller rounds.
    """
    q, k, v, mask = _prepare(q, k, v, mask)
    logits = q @ k.unsqueeze(-3).mT * scale
    _, weight = masked_softmax(logits, mask, eps)
    mass = weight.sum(-1)
    updates = weight @ v.unsqueeze(-3) * reciprocal_or_zero(mass).unsqueeze(-1)
    return updates, logits, mass


def slot_attention_backward(
    grad_updates: Tensor | None,
    grad_logits: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    eps: float,
    needs_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and mask (None unless asked for), built of differentiable operations."""
    q_, k_, v_, mask_ = _prepare(q, k, v, mask)
    grad, grad_v, grad_mask = 0, v_.new_zeros(v_.shape), None
    if grad_updates is not None:
        grad_updates = grad_updates.to(q_.dtype)
        probability, weight = masked_softmax(q_ @ k_.unsqueeze(-3).mT * scale, mask_, eps)
        inverse = reciprocal_or_zero(weight.sum(-1)).unsqueeze(-1)
        attention = weight * inverse
        grad_attention = grad_updates @ v_.unsqueeze(-3).mT
        grad_weight = (grad_attention - (grad_attention * attention).sum(-1, keepdim=True)) * inverse
        grad, grad_mask = softmax_gradients(grad_weight, probability, mask_, eps, needs_mask)
        grad_v = attention.flatten(-3, -2).mT @ grad_updates.flatten(-3, -2)
    elif needs_mask:
        grad_mask = mask_.new_zeros(mask_.shape)
    if grad_logits is not None:
        grad_logits = grad_logits.to(q_.dtype)
        if mask is not None:
            grad_logits = grad_logits.masked_fill(_unread(mask)[..., None, None, :], 0)
        grad = grad + grad_logits
    grad = grad * scale
    grad_q = grad @ k_.unsqueeze(-3)
    grad_k = grad.flatten(-3, -2).mT @ q_.flatten(-3, -2)
    return (
        grad_q.to(q.dtype),
        grad_k.to(k.dtype),
        grad_v.to(v.dtype),
        None if grad_mask is None else grad_mask.to(mask.dtype),
    )


def _unread(mask: Tensor) -> Tensor:
    return (mask == 0).all(-2)


def _prepare(q, k, v, mask):
    dtype = arithmetic(q.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if mask is not None:
        unread = _unread(mask).unsqueeze(-1)
        k, v, mask = k.masked_fill(unread, 0), v.masked_fill(unread, 0), mask.to(dtype)
    return q, k, v, mask
