"""Transport on the CPU: products by PyTorch, everything between them by the compiled Sinkhorn kernels.

Scores and plans exist for a few elements of the batch at a time, no more than fit a cache.
"""

import math

import torch
from torch import Tensor

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
    """Both directions of a pair of frames from one product."""
    frames, n = tokens.shape[-3:-1]
    firsts = [i for i in range(frames) for j in range(i + 1, frames)]
    seconds = [j for i in range(frames) for j in range(i + 1, frames)]
    out = torch.zeros(values.shape, dtype=compute_dtype(values.dtype))
    if not firsts or not out.numel():
        return out.to(values.dtype)
    clips = [_flat(t, trailing) for t, trailing in ((tokens, 3), (values, 3), (out, 3))]
    flat_masses = None if masses is None else _flat(masses, 2)
    rows, columns = torch.tensor(firsts + seconds), torch.tensor(seconds + firsts)
    # One memory for all clips: a fresh page costs more than what is written to it.
    scores, plan = (torch.empty(2 * len(firsts), n, n, dtype=out.dtype) for _ in range(2))
    for clip in range(clips[0].shape[0]):
        features, moved = (t[clip].to(out.dtype) for t in clips[:2])
        if similarity == "cosine":
            features = _unit(features)[0]
        torch.bmm(features[firsts], features[seconds].mT, out=scores[: len(firsts)])
        scores[len(firsts) :] = scores[: len(firsts)].mT
        a, b = (None, None) if masses is None else (flat_masses[clip][rows], flat_masses[clip][columns])
        sinkhorn.forward(scores, a, b, None, eps, n_iters, None, False, True, False, plan)
        clips[2][clip].index_add_(0, rows, plan @ moved[columns])
    return out.to(values.dtype)


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
