"""The definition of slot_softmax in plain PyTorch: any device, any floating dtype."""

import torch
from torch import Tensor

from objslot.ops._arithmetic import compute_dtype


def reciprocal_or_zero(mass: Tensor) -> Tensor:
    """1 / mass, and 0 where a slot gathered no mass at all; NaN stays NaN."""
    empty = mass == 0
    return torch.where(empty, 0, 1 / torch.where(empty, 1, mass))


def masked_softmax(logits: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Softmax over the slots (..., g, p, n), and its masked sum with eps: `probability`, `weight`, same shapes.

    A position whose mask is 0 is left out of its group: its logits are not looked at, its weight is 0.
    """
    if mask is None:
        probability = logits.softmax(-2)
        return probability, probability + eps
    left_out = (mask == 0).unsqueeze(-2)
    probability = logits.masked_fill(left_out, 0).softmax(-2)
    weight = (probability + eps) * mask.unsqueeze(-2)
    return probability, weight.masked_fill(left_out, 0)


def slot_softmax(logits: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Weights (..., g, p, n) in the dtype of `logits`, and the mass (..., g, p) they were divided by."""
    dtype = compute_dtype(logits.dtype)
    _, weight = masked_softmax(logits.to(dtype), None if mask is None else mask.to(dtype), eps)
    mass = weight.sum(-1)
    return (weight * reciprocal_or_zero(mass).unsqueeze(-1)).to(logits.dtype), mass


def softmax_gradients(
    grad_weight: Tensor, probability: Tensor, mask: Tensor | None, eps: float, needs_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """Back through `masked_softmax`: gradients of the logits (..., g, p, n) and of the mask (..., g, n)."""
    grad_mask = None
    if mask is not None:
        left_out = mask == 0
        if needs_mask:
            grad_mask = (grad_weight * (probability + eps)).sum(-2).masked_fill(left_out, 0)
        grad_weight = (grad_weight * mask.unsqueeze(-2)).masked_fill(left_out.unsqueeze(-2), 0)
    product = probability * grad_weight
    return product - probability * product.sum(-2, keepdim=True), grad_mask


def slot_softmax_backward(
    grad: Tensor, logits: Tensor, mask: Tensor | None, eps: float, needs_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `logits` and of `mask` (None unless asked for), built of differentiable operations."""
    dtype = compute_dtype(logits.dtype)
    mask_ = None if mask is None else mask.to(dtype)
    probability, weight = masked_softmax(logits.to(dtype), mask_, eps)
    inverse = reciprocal_or_zero(weight.sum(-1)).unsqueeze(-1)
    grad = grad.to(dtype)
    grad_weight = (grad - (grad * weight).sum(-1, keepdim=True) * inverse) * inverse
    grad_logits, grad_mask = softmax_gradients(grad_weight, probability, mask_, eps, needs_mask)
    return grad_logits.to(logits.dtype), None if grad_mask is None else grad_mask.to(mask.dtype)
