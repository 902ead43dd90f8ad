"""Sinkhorn by the compiled CPU kernels."""

import math

import torch
from torch import Tensor

from objslot.ops import _native
from objslot.ops._arithmetic import compute_dtype

ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def forward(scores, a, b, start, eps, n_iters, tol, history, store_plan, return_error):
    """The results of the op by name; None for what is not asked for."""
    shape, dtype = scores.shape, compute_dtype(scores.dtype)
    *batch, n, m = shape
    rows = _rows(scores), _rows(a, 1), _rows(b, 1), _rows(start, 1)
    found = {
        "plan": _native.empty(shape, scores.dtype) if store_plan else None,
        "f": None if store_plan else torch.empty((*batch, n), dtype=dtype),
        "g": None if store_plan else torch.empty((*batch, m), dtype=dtype),
        "error": torch.empty(batch, dtype=dtype) if return_error else None,
        "history_f": torch.empty((1 + n_iters, *batch, n), dtype=dtype) if history else None,
        "history_g": torch.empty((n_iters, *batch, m), dtype=dtype) if history else None,
        "count": torch.empty(batch, dtype=torch.int64) if history else None,
    }
    _native.load().sinkhorn_forward(
        _problem(*rows, eps, n_iters, tol), *map(_address, found.values()), torch.get_num_threads()
    )
    return found


def backward(grad_plan, grad_f, grad_g, scores, a, b, start, plan, history_f, history_g, count, eps, n_iters, tol):
    """Gradients of scores, a and b; None for a marginal that was not given."""
    shape = scores.shape
    scores, a_rows, b_rows, start = _rows(scores), _rows(a, 1), _rows(b, 1), _rows(start, 1)
    grad_plan = None if grad_plan is None else _rows(grad_plan)
    grad_f, grad_g = (None if t is None else t.contiguous() for t in (grad_f, grad_g))
    plan = None if plan is None or plan.numel() == 0 else plan
    grad_scores = _native.empty(shape, scores.dtype)
    grad_a = None if a is None else torch.empty(a.shape, dtype=a.dtype)
    grad_b = None if b is None else torch.empty(b.shape, dtype=b.dtype)
    _native.load().sinkhorn_backward(
        _problem(scores, a_rows, b_rows, start, eps, n_iters, tol),
        _address(grad_plan),
        *((0, 0) if grad_plan is None else grad_plan.stride()[:2]),
        *map(_address, (grad_f, grad_g, plan, history_f, history_g, count)),
        *map(_address, (grad_scores, grad_a, grad_b)),
        torch.get_num_threads(),
    )
    return grad_scores, grad_a, grad_b


def _rows(tensor: Tensor | None, trailing: int = 2) -> Tensor | None:
    """The tensor with one batch dimension and a contiguous last one, copied where strides forbid a view."""
    if tensor is None:
        return None
    if tensor.dim() != trailing + 1:
        batch = math.prod(tensor.shape[: tensor.dim() - trailing])
        tensor = tensor.reshape(batch, *tensor.shape[tensor.dim() - trailing :])
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _problem(scores, a, b, start, eps, n_iters, tol):
    batch_stride, row_stride, _ = scores.stride()
    return _native.load().SinkhornProblem(
        scores.data_ptr(),
        ELEMENTS[scores.dtype],
        (*scores.shape, batch_stride, row_stride),
        *_strided(a),
        *_strided(b),
        *_strided(start),
        eps,
        n_iters,
        -1.0 if tol is None else tol,
    )


def _strided(rows: Tensor | None) -> tuple[int, int]:
    return (0, 0) if rows is None else (rows.data_ptr(), rows.stride(0))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
