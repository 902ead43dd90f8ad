"""Transport on the CPU by the compiled kernels: scores and plan exist for one element of the batch and thread."""

import math

import torch
from torch import Tensor

from objslot.ops import _native
from objslot.ops._arithmetic import SHORTEST, compute_dtype
from objslot.ops.sinkhorn import native as sinkhorn

# Scores of clips that are worked on at a time, unless a single clip has more.
BLOCK_ENTRIES = 1 << 19


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
        sinkhorn.ELEMENTS[tensors[0].dtype],
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
    frames, n = tokens.shape[-3:-1]
    dtype = compute_dtype(values.dtype)
    out = torch.zeros(values.shape, dtype=dtype)
    if frames < 2 or not out.numel():
        return out.to(values.dtype)
    firsts, seconds = _pairs(frames)
    clip_tokens, clip_values, clip_out = (_flat(t, 3) for t in (tokens, values, out))
    clip_masses = None if masses is None else _flat(masses, 2)
    # As many clips at a time as keep all threads busy, and as keep what lies between in the cache.
    step = max(1, min(2 * torch.get_num_threads() // len(firsts), BLOCK_ENTRIES // (len(firsts) * n * n)))
    for start in range(0, len(clip_out), step):
        block = slice(start, start + step)
        x, v = (t[block].to(dtype).contiguous() for t in (clip_tokens, clip_values))
        mass = None if masses is None else clip_masses[block].contiguous()
        _align(x, v, mass, firsts, seconds, eps, n_iters, similarity, clip_out[block])
    return out.to(values.dtype)


def _pairs(frames: int) -> tuple[Tensor, Tensor]:
    """The unordered pairs of frames; those as far apart as each other stand together."""
    gaps = range(1, frames)
    firsts = torch.cat([torch.arange(frames - gap) for gap in gaps])
    return firsts, torch.cat([torch.arange(gap, frames) for gap in gaps])


def _align(x, values, masses, firsts, seconds, eps, n_iters, similarity, out):
    """Adds to `out` (clips, t, n, c) what every frame gets from the others."""
    clips, frames, n, features = x.shape
    native = _native.load()
    by_tokens = similarity == "cosine" and x.dtype == torch.float32 and native.multiplies_tokens()
    scores = None if by_tokens else _pair_scores(x, similarity)
    offsets = frames * torch.arange(clips).unsqueeze(-1)
    rows, columns = ((t + offsets).flatten() for t in (firsts, seconds))
    moved = torch.empty(2, len(rows), *values.shape[-2:], dtype=x.dtype)
    lost = torch.empty(len(rows), dtype=torch.uint8)
    native.transport_pairs(
        x.dtype == torch.float64,
        *(0 if t is None else t.data_ptr() for t in (scores, x if by_tokens else None)),
        (clips * frames, features),
        SHORTEST,
        *(0 if t is None else t.data_ptr() for t in (values, masses, rows, columns)),
        (len(rows), n, values.shape[-1]),
        eps,
        n_iters,
        *(t.data_ptr() for t in (*moved, lost)),
        torch.get_num_threads(),
    )
    values, out = values.flatten(0, 1), out.flatten(0, 1)
    masses = None if masses is None else masses.flatten(0, 1)
    if lost.any():
        if scores is None:
            scores = _pair_scores(x, similarity)
        for pair in lost.nonzero().flatten():
            moved[0, pair] = _one_way(scores[pair], values, masses, rows[pair], columns[pair], eps, n_iters)
            moved[1, pair] = _one_way(scores[pair].mT, values, masses, columns[pair], rows[pair], eps, n_iters)
    out.index_add_(0, rows, moved[0]).index_add_(0, columns, moved[1])


def _pair_scores(x: Tensor, similarity: str) -> Tensor:
    """Scores (clips * pairs, n, n) in the order of `_pairs`, clip by clip."""
    clips, frames, n, _ = x.shape
    if similarity == "cosine":
        x = _unit(x)[0]
    scores = x.new_empty(clips, frames * (frames - 1) // 2, n, n)
    for clip in range(clips):
        start = 0
        for gap in range(1, frames):
            # Views, where the pairs in the order of itertools would be copies.
            torch.bmm(x[clip, :-gap], x[clip, gap:].mT, out=scores[clip, start : start + frames - gap])
            start += frames - gap
    return scores.flatten(0, 1)


def _one_way(scores, values, masses, target, source, eps, n_iters):
    """What frame `target` gets from `source`, by the kernel that knows logarithms."""
    a, b = (None, None) if masses is None else (masses[target : target + 1], masses[source : source + 1])
    plan = sinkhorn.forward(scores.unsqueeze(0), a, b, None, eps, n_iters, None, False, True, False)["plan"]
    return plan[0] @ values[source]


def _flat(tensor: Tensor | None, trailing: int) -> Tensor | None:
    if tensor is None:
        return None
    batch = math.prod(tensor.shape[: tensor.dim() - trailing])
    return tensor.reshape(batch, *tensor.shape[tensor.dim() - trailing :])


def _unit(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of length one, and the lengths they had, none below SHORTEST."""
    lengths = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp_min(SHORTEST)
    return tokens / lengths, lengths
