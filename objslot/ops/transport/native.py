"""Transport on the CPU by the compiled kernels: scores and plan exist for one element of the batch and thread."""

import math

import torch
from torch import Tensor

from objslot.ops import _native
from objslot.ops._arithmetic import SHORTEST, compute_dtype


def forward(x, y, values, a, b, start, eps, n_iters, tol, similarity, return_error):
    """plan @ values, and the marginal error."""
    out = torch.empty((*x.shape[:-1], values.shape[-1]), dtype=values.dtype)
    error = torch.empty(x.shape[:-2], dtype=compute_dtype(x.dtype)) if return_error else None
    tensors = _batched(x, y, values, a, b, start)
    problem = _problem(tensors, eps, n_iters, tol, similarity)
    _native.load().transport_forward(problem, *map(_address, (out, error)), torch.get_num_threads())
    return out, error


def backward(grad, x, y, values, a, b, start, eps, n_iters, tol, similarity):
    """Gradients of the five tensors; the forward is repeated."""
    grads = [None if t is None else _native.empty(t.shape, t.dtype) for t in (x, y, values, a, b)]
    grad = grad.contiguous()
    tensors = _batched(x, y, values, a, b, start)
    problem = _problem(tensors, eps, n_iters, tol, similarity)
    _native.load().transport_backward(problem, grad.data_ptr(), list(map(_address, grads)), torch.get_num_threads())
    return grads


def _batched(x, y, values, a, b, start) -> list[Tensor | None]:
    """The tensors with one batch dimension of any stride and the rest contiguous, copied where that is no view."""
    tensors = [_flat(t, 2) for t in (x, y, values)] + [_flat(t, 1) for t in (a, b, start)]
    return [t if t is None or not t.numel() or t[0].is_contiguous() else t.contiguous() for t in tensors]


def _problem(tensors, eps, n_iters, tol, similarity):
    """What the kernels take; `tensors` must live while they run."""
    (batch, n, d), (_, m, c) = tensors[0].shape, tensors[2].shape
    addresses = list(map(_address, tensors))
    strides = [0 if t is None else t.stride(0) for t in tensors]
    return _native.load().TransportProblem(
        addresses[:3],
        strides[:3],
        _native.ELEMENTS[tensors[0].dtype],
        addresses[3:],
        strides[3:],
        (batch, n, m, d, c),
        similarity == "cosine",
        SHORTEST,
        eps,
        n_iters,
        -1.0 if tol is None else tol,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def alignment(tokens, values, masses, eps, n_iters, similarity):
    """Both directions of a pair of frames from one product and one kernel matrix; no plan is made."""
    dtype = compute_dtype(tokens.dtype)
    out = torch.empty(values.shape, dtype=dtype)
    held = [tokens.contiguous(), values.to(dtype).contiguous(), None if masses is None else masses.contiguous()]
    clips, (frames, n, d), c = math.prod(tokens.shape[:-3]), tokens.shape[-3:], values.shape[-1]
    _native.load().align_frames(
        held[0].data_ptr(),
        _native.ELEMENTS[tokens.dtype],
        *map(_address, held[1:]),
        (clips, frames, n, d, c),
        similarity == "cosine",
        SHORTEST,
        eps,
        n_iters,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(values.dtype)


def _flat(tensor: Tensor | None, trailing: int) -> Tensor | None:
    if tensor is None:
        return None
    batch = math.prod(tensor.shape[: tensor.dim() - trailing])
    return tensor.reshape(batch, *tensor.shape[tensor.dim() - trailing :])
