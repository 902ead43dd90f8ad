"""The definition of slot_attention in plain PyTorch: any device, any floating dtype."""

from torch import Tensor

from objslot.ops._arithmetic import compute_dtype
from objslot.ops.slot_softmax.reference import (
    masked_softmax,
    reciprocal_or_zero,
    softmax_gradients,
)


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Updates (..., g, p, e), logits (..., g, p, n) and the mass (..., g, p) of every slot.

    All three in the dtype of the arithmetic: the caller rounds.
    """
    q, k, v, mask, bias = _prepare(q, k, v, mask, bias)
    logits = _logits(q, k, mask, bias, scale)
    _, weight = masked_softmax(logits, mask, eps)
    mass = weight.sum(-1)
    updates = weight @ v.unsqueeze(-3) * reciprocal_or_zero(mass).unsqueeze(-1)
    return updates, logits, mass


def slot_attention_backward(
    grad_updates: Tensor | None,
    grad_logits: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, mask and bias (None for those that are None), of differentiable operations."""
    q_, k_, v_, mask_, bias_ = _prepare(q, k, v, mask, bias)
    grad, grad_v, grad_mask = 0, v_.new_zeros(v_.shape), None if mask is None else mask_.new_zeros(mask_.shape)
    if grad_updates is not None:
        grad_updates = grad_updates.to(q_.dtype)
        probability, weight = masked_softmax(_logits(q_, k_, mask_, bias_, scale), mask_, eps)
        inverse = reciprocal_or_zero(weight.sum(-1)).unsqueeze(-1)
        attention = weight * inverse
        grad_attention = grad_updates @ v_.unsqueeze(-3).mT
        grad_weight = (grad_attention - (grad_attention * attention).sum(-1, keepdim=True)) * inverse
        grad, grad_mask = softmax_gradients(grad_weight, probability, mask_, eps, mask is not None)
        grad_v = attention.flatten(-3, -2).mT @ grad_updates.flatten(-3, -2)
    if grad_logits is not None:
        grad_logits = grad_logits.to(q_.dtype)
        if mask is not None:
            grad_logits = grad_logits.masked_fill(_unread(mask)[..., None, None, :], 0)
        grad = grad + grad_logits
    grad_q = grad @ k_.unsqueeze(-3) * scale
    grad_k = grad.flatten(-3, -2).mT @ q_.flatten(-3, -2) * scale
    if v is None:
        grad_k, grad_v = grad_k + grad_v, None
    return (
        grad_q.to(q.dtype),
        grad_k.to(k.dtype),
        None if v is None else grad_v.to(v.dtype),
        None if mask is None else grad_mask.to(mask.dtype),
        None if bias is None else grad.sum(-1).to(bias.dtype),
    )


def _logits(q, k, mask, bias, scale):
    logits = q @ k.unsqueeze(-3).mT * scale
    if bias is None:
        return logits
    logits = logits + bias.unsqueeze(-1)
    return logits if mask is None else logits.masked_fill(_unread(mask)[..., None, None, :], 0)


def _unread(mask: Tensor) -> Tensor:
    return (mask == 0).all(-2)


def _prepare(q, k, v, mask, bias):
    dtype = compute_dtype(q.dtype)
    q, k, v = q.to(dtype), k.to(dtype), None if v is None else v.to(dtype)
    if mask is not None:
        unread = _unread(mask).unsqueeze(-1)
        k, mask = k.masked_fill(unread, 0), mask.to(dtype)
        v = None if v is None else v.masked_fill(unread, 0)
    return q, k, k if v is None else v, mask, None if bias is None else bias.to(dtype)
