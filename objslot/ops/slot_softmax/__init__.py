"""Softmax over slots, masked and normalised over positions: the attention weights of slot attention."""

import torch
from torch import Tensor

from objslot.ops import _checks
from objslot.ops.slot_softmax import autograd

__all__ = ["facts", "slot_softmax"]


def slot_softmax(
    logits: Tensor, mask: Tensor | None = None, *, eps: float = 1e-8, backend: str | None = None
) -> Tensor:
    """Attention weights of slot attention (Locatello et al. 2020, Algorithm 1, lines 7 and 8), masked.

        w[g, i, j] = (softmax over the slots i of logits[g, i, j] + eps) * mask[g, j]
        weights[g, i, j] = w[g, i, j] / sum over the positions j of w[g, i, j]

    Args:
        logits: (..., g, p, n), g groups of p slots that compete for n positions; float16, bfloat16, float32 or
            float64. Half precision is computed in float32.
        mask: (..., g, n), weights of the positions, not negative; or bool. Leading dimensions broadcast. Where it
            is 0 the position is left out of the group: it may hold anything, NaN included, its weight is 0, and
            so are its gradients. None counts every position once.
        eps: above 0, added to the softmax so that a slot that wins nowhere averages all positions.
        backend: see `objslot.use_backend`; None leaves the choice to the context, the environment and the shapes.

    Returns:
        weights (..., g, p, n), dtype of `logits`. A slot without any position has weights 0. NaN stays inside its
        batch element.

    Gradients: `logits` and `mask`, exact. Second derivatives go through the reference.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, eps not above 0.
        BackendError: the backend asked for by name cannot serve the call.
    """
    _checks.tensor("logits", logits, "(..., g, p, n)")
    _checks.floating("logits", logits)
    _checks.positive("eps", eps)
    check_sizes("logits", logits.shape, groups=-3, slots=-2)
    if mask is not None:
        mask = prepare_mask(mask, logits, "logits", (*logits.shape[:-2], logits.shape[-1]))
    return autograd.slot_softmax(logits, mask, eps, backend)


def facts(logits: Tensor, mask: Tensor | None = None, *, eps: float = 1e-8) -> dict:
    """What decides the backend of `slot_softmax(logits, mask)`."""
    return autograd.facts(logits)


def check_sizes(name: str, shape: torch.Size, **least_one: int) -> None:
    """The dimensions given by keyword, as places in `shape`, are not empty."""
    for what, place in least_one.items():
        if shape[place] == 0:
            raise ValueError(f"{name}: expected at least one of the {what}, got shape {tuple(shape)}")


def prepare_mask(mask: Tensor, like: Tensor, like_name: str, shape: tuple[int, ...]) -> Tensor:
    """`mask` checked, in the dtype of `like`, with its leading dimensions expanded to `shape`."""
    _checks.tensor("mask", mask, "(..., g, n)")
    if mask.device != like.device:
        raise ValueError(f"mask: expected device {like.device}, that of {like_name}, got {mask.device}")
    if mask.dtype != torch.bool:
        _checks.floating("mask", mask)
    return _checks.expanded("mask", mask.to(like.dtype), shape, "(..., g, n)")
