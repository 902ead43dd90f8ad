"""Sinkhorn by the CUDA kernels, for matrices that fit the shared memory of one or two blocks."""

import math

import torch
from torch import Tensor

from objslot.ops import _cuda

ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
MOST_SIDE = 256


def why_not(*, device, dtype, n, m, started=False, **facts) -> str | None:
    """The row of the table of backends."""
    if started:
        return "starts from potentials of zero only"
    if dtype not in ELEMENTS:
        return "computes in float32, got float64"
    if max(n, m) > MOST_SIDE:
        return f"holds matrices of at most {MOST_SIDE} a side, got {n} x {m}"
    return _cuda.why_not(device=device)


def forward(scores, a, b, start, eps, n_iters, tol, history, store_plan, return_error):
    """The results of the op by name; None for what is not asked for. The history is in base 2."""
    *batch, n, m = scores.shape

    def empty(*shape):
        return scores.new_empty(shape, dtype=torch.float32)

    found = {
        "plan": scores.new_empty(scores.shape) if store_plan else None,
        "f": None if store_plan else empty(*batch, n),
        "g": None if store_plan else empty(*batch, m),
        "error": empty(*batch) if return_error else None,
        # The kernels of the CPU keep something else in a first slot.
        "history_f": empty(1 + n_iters, *batch, n) if history else None,
        "history_g": empty(n_iters, *batch, m) if history else None,
        "count": scores.new_empty(batch, dtype=torch.int64) if history else None,
    }
    results = [_address(found[name]) for name in ("plan", "f", "g", "error")]
    with torch.cuda.device_of(scores):
        _cuda.load()[0].sinkhorn_forward(
            _problem(_flat(scores, 2), _flat(a, 1), _flat(b, 1), eps, n_iters, tol), *results,
            _history(found["history_f"], found["history_g"], found["count"]), _stream(scores),
        )  # fmt: skip
    return found


def backward(grad_plan, grad_f, grad_g, scores, a, b, start, plan, history_f, history_g, count, eps, n_iters, tol):
    """Gradients of scores, a and b; None for a marginal that was not given."""
    grad_scores = scores.new_empty(scores.shape)
    grad_a, grad_b = (None if mass is None else mass.new_empty(mass.shape) for mass in (a, b))
    grad_plan = _flat(grad_plan, 2)
    grad_f, grad_g = (None if grad is None else grad.contiguous() for grad in (grad_f, grad_g))
    factors, shares = torch.empty_like(history_f[1:]), torch.empty_like(history_g)
    with torch.cuda.device_of(scores):
        _cuda.load()[0].sinkhorn_backward(
            _problem(_flat(scores, 2), _flat(a, 1), _flat(b, 1), eps, n_iters, tol),
            _address(grad_plan), [0, 0, 0] if grad_plan is None else list(grad_plan.stride()),
            _address(grad_f), _address(grad_g), _history(history_f, history_g, count),
            *map(_address, (factors, shares, grad_scores, grad_a, grad_b)), _stream(scores),
        )  # fmt: skip
    return grad_scores, grad_a, grad_b


def _flat(tensor: Tensor | None, trailing: int) -> Tensor | None:
    """The tensor with one batch dimension; a vector with its entries beside each other."""
    if tensor is None:
        return None
    batch = math.prod(tensor.shape[: tensor.dim() - trailing])
    tensor = tensor.reshape(batch, *tensor.shape[tensor.dim() - trailing :])
    return tensor if trailing == 2 or tensor.stride(-1) == 1 else tensor.contiguous()


def _problem(scores, a, b, eps, n_iters, tol):
    a_stride, b_stride = (0 if mass is None else mass.stride(0) for mass in (a, b))
    return _cuda.load()[0].SinkhornProblem(
        _address(scores), ELEMENTS[scores.dtype], [*scores.shape, *scores.stride()], _address(a), a_stride,
        _address(b), b_stride, eps, n_iters, -1.0 if tol is None else tol,
    )  # fmt: skip


def _history(history_f, history_g, count):
    return [0, 0, 0] if history_f is None else [_address(history_f[1:]), _address(history_g), _address(count)]


def _stream(tensor):
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
