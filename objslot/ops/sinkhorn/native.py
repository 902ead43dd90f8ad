"""Sinkhorn by the compiled CPU kernels."""

import math

import torch
from torch import Tensor

from objslot.ops import _native
from objslot.ops._arithmetic import compute_dtype


def forward(scores, a, b, start, eps, n_iters, tol, history, store_plan, return_error):
    """The results of the op by name; None for what is not asked for."""
    *batch, n, m = scores.shape
    dtype = compute_dtype(scores.dtype)
    iterations = {
        "history_f": torch.empty((1 + n_iters, *batch, n), dtype=dtype) if history else None,
        "history_g": torch.empty((n_iters, *batch, m), dtype=dtype) if history else None,
        "count": torch.empty(batch, dtype=torch.int64) if history else None,
    }
    places = map(_address, iterations.values())
    results = _solve(scores, a, b, start, eps, n_iters, tol, places, store_plan, return_error)
    return dict(zip(("plan", "f", "g", "error"), results, strict=True)) | iterations


def forward_in_one(scores, a, b, start, eps, n_iters, tol, history, store_plan, return_error):
    """plan, f, g, error and, for `backward_from_one`, one block of memory with the whole history."""
    block, places = None, (0, 0, 0)
    if history:
        *places, size = _places(scores.shape, scores.dtype, n_iters)
        block = torch.empty(size, dtype=torch.uint8)
        address = block.data_ptr()
        places = [address + place for place in places]
    return *_solve(scores, a, b, start, eps, n_iters, tol, places, store_plan, return_error), block


def backward(grad_plan, grad_f, grad_g, scores, a, b, start, plan, history_f, history_g, count, eps, n_iters, tol):
    """Gradients of scores, a and b; None for a marginal that was not given."""
    places = map(_address, (history_f, history_g, count))
    return _undo(grad_plan, grad_f, grad_g, scores, a, b, start, plan, places, eps, n_iters, tol)


def backward_from_one(grad_plan, grad_f, grad_g, scores, a, b, start, plan, block, eps, n_iters, tol):
    """`backward` from the memory of `forward_in_one`."""
    address = block.data_ptr()
    places = [address + place for place in _places(scores.shape, scores.dtype, n_iters)[:3]]
    return _undo(grad_plan, grad_f, grad_g, scores, a, b, start, plan, places, eps, n_iters, tol)


def iterations_of(block, scores, n_iters):
    """history_f, history_g and count as tensors on the memory of `forward_in_one`."""
    *batch, n, m = scores.shape
    dtype = compute_dtype(scores.dtype)
    f, g, _, end = _places(scores.shape, scores.dtype, n_iters)
    return (
        block[f:g].view(dtype).view(1 + n_iters, *batch, n),
        block[g:end].view(dtype).view(n_iters, *batch, m),
        block[:f].view(torch.int64).view(batch),
    )


def _places(shape, dtype, n_iters):
    """Where history_f, history_g and count lie in one block of memory, and its bytes."""
    *batch, n, m = shape
    count, size = math.prod(batch), 8 if dtype == torch.float64 else 4
    f = 8 * count
    g = f + (1 + n_iters) * count * n * size
    return f, g, 0, g + n_iters * count * m * size


def _solve(scores, a, b, start, eps, n_iters, tol, places, store_plan, return_error):
    shape, dtype = scores.shape, scores.dtype
    plan = f = g = error = None
    if store_plan:
        plan = _native.empty(shape, dtype)
    else:
        f = torch.empty(shape[:-1], dtype=compute_dtype(dtype))
        g = torch.empty((*shape[:-2], shape[-1]), dtype=compute_dtype(dtype))
    if return_error:
        error = torch.empty(shape[:-2], dtype=compute_dtype(dtype))
    rows = _rows(scores), _rows(a, 1), _rows(b, 1), _rows(start, 1)
    _native.load().sinkhorn_forward(
        _problem(*rows, eps, n_iters, tol),
        _address(plan),
        _address(f),
        _address(g),
        _address(error),
        *places,
        torch.get_num_threads(),
    )
    return plan, f, g, error


def _undo(grad_plan, grad_f, grad_g, scores, a, b, start, plan, places, eps, n_iters, tol):
    shape = scores.shape
    scores, a_rows, b_rows, start = _rows(scores), _rows(a, 1), _rows(b, 1), _rows(start, 1)
    grad_plan = _rows(grad_plan)
    grad_f, grad_g = (None if t is None else t.contiguous() for t in (grad_f, grad_g))
    plan = None if plan is None or plan.numel() == 0 else plan
    grad_scores = _native.empty(shape, scores.dtype)
    grad_a = None if a is None else torch.empty(a.shape, dtype=a.dtype)
    grad_b = None if b is None else torch.empty(b.shape, dtype=b.dtype)
    _native.load().sinkhorn_backward(
        _problem(scores, a_rows, b_rows, start, eps, n_iters, tol),
        _address(grad_plan),
        *((0, 0) if grad_plan is None else grad_plan.stride()[:2]),
        _address(grad_f),
        _address(grad_g),
        _address(plan),
        *places,
        _address(grad_scores),
        _address(grad_a),
        _address(grad_b),
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
        _native.ELEMENTS[scores.dtype],
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
