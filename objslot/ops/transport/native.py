"""Transport on the CPU: products of tokens by PyTorch, everything else by the compiled kernels.

Scores exist for a few elements of the batch at a time, no more than fit a cache, and so do the plans that are made.
"""

import math

import torch
from torch import Tensor

from objslot.ops import _native
from objslot.ops._arithmetic import SHORTEST, compute_dtype
from objslot.ops.sinkhorn import native as sinkhorn

# Scores that are worked on at a time, unless a single matrix has more.
BLOCK_ENTRIES = 1 << 19


def forward(x, y, values, a, b, start, eps, n_iters, tol, similarity, return_error):
    """plan @ values, and the marginal error."""
    out = values.new_empty(*x.shape[:-1], values.shape[-1])
    error = x.new_empty(x.shape[:-2], dtype=compute_dtype(x.dtype)) if return_error else None
    flat_out = _flat(out, 2)
    for where, (x_part, y_part, values_part, a_part, b_part, start_part) in _blocks(x, y, values, a, b, start):
        if similarity == "cosine":
            x_part, y_part = _unit(x_part)[0], _unit(y_part)[0]
        found = sinkhorn.forward(
            x_part @ y_part.mT, a_part, b_part, start_part, eps, n_iters, tol, False, True, return_error
        )
        flat_out[where] = found["plan"] @ values_part
        if return_error:
            error.view(-1)[where] = found["error"]
    return out, error


def backward(grad, x, y, values, a, b, start, eps, n_iters, tol, similarity):
    """Gradients of the five tensors; the forward is repeated."""
    grads = [None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in (x, y, values, a, b)]
    flat = [None if t is None else _flat(t, 2 if i < 3 else 1) for i, t in enumerate(grads)]
    flat_grad = _flat(grad, 2)
    for where, (x_part, y_part, values_part, a_part, b_part, start_part) in _blocks(x, y, values, a, b, start):
        grad_part = flat_grad[where].to(x_part.dtype)
        lengths = None
        if similarity == "cosine":
            (x_part, x_lengths), (y_part, y_lengths) = _unit(x_part), _unit(y_part)
            lengths = x_lengths, y_lengths
        scores = x_part @ y_part.mT
        found = sinkhorn.forward(scores, a_part, b_part, start_part, eps, n_iters, tol, True, True, False)
        grad_scores, grad_a, grad_b = sinkhorn.backward(
            grad_part @ values_part.mT,
            *(None, None, scores, a_part, b_part, start_part, found["plan"]),
            *(found["history_f"], found["history_g"], found["count"], eps, n_iters, tol),
        )
        grad_x, grad_y = grad_scores @ y_part, grad_scores.mT @ x_part
        if lengths is not None:
            grad_x, grad_y = (
                _through_unit(grad_x, x_part, lengths[0]),
                _through_unit(grad_y, y_part, lengths[1]),
            )
        parts = (grad_x, grad_y, found["plan"].mT @ grad_part, grad_a, grad_b)
        for target, part in zip(flat, parts, strict=True):
            if target is not None:
                target[where] = part
    return grads


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


def _blocks(x, y, values, a, b, start):
    """Slices of the flattened batch, and what they cut from each tensor, in the arithmetic dtype."""
    flat = [_flat(t, 2) for t in (x, y, values)] + [_flat(t, 1) for t in (a, b, start)]
    dtype = compute_dtype(x.dtype)
    step = max(torch.get_num_threads(), BLOCK_ENTRIES // (x.shape[-2] * y.shape[-2]))
    for start in range(0, flat[0].shape[0], step):
        where = slice(start, start + step)
        yield where, [None if t is None else t[where].to(dtype) for t in flat]


def _flat(tensor: Tensor | None, trailing: int) -> Tensor | None:
    if tensor is None:
        return None
    batch = math.prod(tensor.shape[: tensor.dim() - trailing])
    return tensor.reshape(batch, *tensor.shape[tensor.dim() - trailing :])


def _unit(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of length one, and the lengths they had, none below SHORTEST."""
    lengths = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp_min(SHORTEST)
    return tokens / lengths, lengths


def _through_unit(grad: Tensor, unit: Tensor, lengths: Tensor) -> Tensor:
    # A token that was lengthened to SHORTEST has a fixed divisor.
    along = (grad * unit).sum(-1, keepdim=True) * unit
    return torch.where(lengths > SHORTEST, grad - along, grad) / lengths
