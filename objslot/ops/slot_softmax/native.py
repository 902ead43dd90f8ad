"""slot_softmax by the compiled CPU kernels."""

import torch

from objslot.ops import _native
from objslot.ops._arithmetic import compute_dtype

ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def forward(logits, mask, eps):
    """Weights and mass, as in `autograd`."""
    weights = torch.empty_like(logits, memory_format=torch.contiguous_format)
    mass = logits.new_empty(logits.shape[:-1], dtype=compute_dtype(logits.dtype))
    logits, mask = logits.contiguous(), None if mask is None else mask.contiguous()
    _native.load().slot_softmax_forward(
        _problem(logits, mask, eps), weights.data_ptr(), mass.data_ptr(), torch.get_num_threads()
    )
    return weights, mass


def backward(grad, logits, mask, mass, eps, needs_mask):
    """Gradients of the logits and of the mask; the latter empty unless needed."""
    grad, logits, mask = grad.contiguous(), logits.contiguous(), None if mask is None else mask.contiguous()
    grad_logits = torch.empty_like(logits)
    grad_mask = torch.empty_like(mask) if needs_mask else logits.new_empty(0)
    _native.load().slot_softmax_backward(
        _problem(logits, mask, eps), grad.data_ptr(), mass.data_ptr(), grad_logits.data_ptr(),
        grad_mask.data_ptr() if needs_mask else 0, torch.get_num_threads(),
    )  # fmt: skip
    return grad_logits, grad_mask


def _problem(logits, mask, eps):
    *batch, slots, positions = logits.shape
    return _native.load().SlotSoftmaxProblem(
        ELEMENTS[logits.dtype],
        torch.Size(batch).numel(),
        slots,
        positions,
        logits.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        eps,
    )
