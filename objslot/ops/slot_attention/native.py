"""Slot attention by the compiled CPU kernels."""

import torch
from torch import Tensor

from objslot.ops import _native
from objslot.ops._arithmetic import compute_dtype

ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


_KEPT = 8
"""A softmax of at most one in so many of the bytes of keys and values is kept for the backward pass."""


def forward(q, k, v, mask, bias, scale, eps, return_logits):
    """Updates, logits (empty unless asked for) and mass, as in `autograd`."""
    return _forward(q, k, v, mask, bias, scale, eps, return_logits, keep=False)[:3]


def forward_for_backward(q, k, v, mask, bias, scale, eps, return_logits):
    """The same, and what spares `backward` a product with the keys: the softmax, or None where it is large."""
    return _forward(q, k, v, mask, bias, scale, eps, return_logits, keep=True)


def _forward(q, k, v, mask, bias, scale, eps, return_logits, keep):
    rows = q.shape[:-1]
    updates = _native.empty((*rows, (k if v is None else v).shape[-1]), q.dtype)
    logits = _native.empty((*rows, k.shape[-2]), q.dtype) if return_logits else q.new_empty(0)
    mass = q.new_empty(rows, dtype=compute_dtype(q.dtype))
    problem, pointed_to = _problem(q, k, v, mask, bias, scale, eps)
    probabilities = None
    row = problem.lanes * mass.element_size()
    if keep and _KEPT * row <= (k.shape[-1] + (0 if v is None else v.shape[-1])) * k.element_size():
        probabilities = _native.empty((*k.shape[:-1], problem.lanes), mass.dtype)
    _native.load().slot_attention_forward(
        problem,
        updates.data_ptr(),
        logits.data_ptr() if return_logits else 0,
        mass.data_ptr(),
        0 if probabilities is None else probabilities.data_ptr(),
        torch.get_num_threads(),
    )
    del pointed_to
    return updates, logits, mass, probabilities


def backward(
    grad_updates, grad_logits, q, k, v, mask, bias, updates, mass, scale, eps, needs, probabilities=None
):
    """Gradients of q, k, v, mask and bias; empty where they are not needed."""
    problem, pointed_to = _problem(q, k, v, mask, bias, scale, eps)
    given = [x if x is None else x.contiguous() for x in (grad_updates, grad_logits, updates, mass, probabilities)]
    grads = [
        _native.empty(like.shape, like.dtype) if wanted else q.new_empty(0)
        for like, wanted in zip((q, k, v, mask, bias), needs, strict=True)
    ]
    _native.load().slot_attention_backward(
        problem,
        [0 if x is None else x.data_ptr() for x in given],
        [grad.data_ptr() if wanted else 0 for grad, wanted in zip(grads, needs, strict=True)],
        torch.get_num_threads(),
    )
    del pointed_to
    return tuple(grads)


def _problem(q, k, v, mask, bias, scale, eps):
    """What the kernels are called with, and the tensors whose memory it points to."""
    q, mask = _elements(q, 3), _elements(mask, 2)
    bias = _elements(bias, 2)
    k, v = _rows(k), _rows(v)
    width, value_width = q.shape[-1], (k if v is None else v).shape[-1]
    sizes = [q.shape[0], q.shape[1], q.shape[2], k.shape[1], width, value_width]
    tensors = (q, k, v, mask, bias)
    strides = [
        q.stride(0),
        k.stride(0),
        k.stride(1),
        0 if v is None else v.stride(0),
        0 if v is None else v.stride(1),
        0 if mask is None else mask.stride(0),
        0 if bias is None else bias.stride(0),
    ]
    problem = _native.load().SlotAttentionProblem(
        ELEMENTS[q.dtype], sizes, [0 if x is None else x.data_ptr() for x in tensors], strides, scale, eps
    )
    return problem, tensors


def _flat(x: Tensor, trailing: int) -> Tensor:
    if x.dim() == trailing + 1:
        return x
    sizes = x.shape[x.dim() - trailing :]
    return x.reshape(x.shape[: x.dim() - trailing].numel(), *sizes)


def _rows(x: Tensor | None) -> Tensor | None:
    """One batch dimension and contiguous rows; a copy only where strides forbid a view."""
    if x is None:
        return None
    x = _flat(x, 2)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _elements(x: Tensor | None, trailing: int) -> Tensor | None:
    """One batch dimension, of any stride, and elements that are contiguous."""
    if x is None:
        return None
    x = _flat(x, trailing)
    return x if x[:1].is_contiguous() else x.contiguous()
