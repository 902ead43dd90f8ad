"""The definition of propagate in plain PyTorch: any device, any floating dtype."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from objslot.ops._arithmetic import SHORTEST, compute_dtype

# Entries of the affinity that the bounded form holds at a time.
BOUND = 1 << 24


def within(height: int, width: int, radius: int, rows: Tensor) -> Tensor:
    """Which positions of the grid lie closer than `radius` to the positions `rows`: bool (rows, h * w)."""
    places = torch.arange(height * width, device=rows.device)
    y = rows[:, None] // width - places // width
    x = rows[:, None] % width - places % width
    return y * y + x * x < radius * radius


def plain(
    query: Tensor, keys: Tensor, labels: Tensor, radius: int, topk: int, temperature: float, n_global: int
) -> Tensor:
    """All at once: holds the affinity (..., h * w, l * h * w)."""
    rows = torch.arange(query.shape[-3] * query.shape[-2], device=query.device)
    return _mix(*_flat(query, keys, labels), rows, radius, topk, temperature, n_global, query.shape[-3:-1]).reshape(
        *query.shape[:-1], labels.shape[-1]
    )


def bounded(
    query: Tensor, keys: Tensor, labels: Tensor, radius: int, topk: int, temperature: float, n_global: int
) -> Tensor:
    """The same in blocks of queries and one batch element at a time, so that memory stays bounded."""
    settings = (radius, topk, temperature, n_global, query.shape[-3:-1])
    results = [
        torch.cat([_mix(q[rows], k, c, rows, *settings) for rows in _blocks(c.shape[-2], q)])
        for q, k, c in _elements(query, keys, labels)
    ]
    if not results:
        return labels.new_empty(*query.shape[:-1], labels.shape[-1])
    return torch.stack(results).reshape(*query.shape[:-1], labels.shape[-1])


def backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    labels: Tensor,
    radius: int,
    topk: int,
    temperature: float,
    n_global: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys and labels, in the same blocks, built of differentiable operations."""
    settings = (radius, topk, temperature, n_global, query.shape[-3:-1])
    grad = grad.reshape(-1, query.shape[-3] * query.shape[-2], labels.shape[-1])
    found = []
    for element, (q, k, c) in enumerate(_elements(query, keys, labels)):
        grad_query, grad_keys, grad_labels = [], torch.zeros_like(k).flatten(0, 1), torch.zeros_like(c)
        grad_labels = grad_labels.to(torch.promote_types(q.dtype, compute_dtype(c.dtype)))
        for rows in _blocks(c.shape[-2], q):
            weight, place = _weights(q[rows], k, rows, *settings)
            flat, width = place.flatten(), place.shape[-1]
            upper = grad[element, rows].to(grad_labels.dtype)
            grad_labels = grad_labels.index_add(
                0, flat, (weight.to(upper.dtype).unsqueeze(-1) * upper.unsqueeze(-2)).flatten(0, 1)
            )
            grad_weight = (c.to(upper.dtype)[place] @ upper.unsqueeze(-1)).squeeze(-1).to(weight.dtype)
            inner = (grad_weight * weight).sum(-1, keepdim=True)
            grad_best = weight * (grad_weight - inner) / temperature
            near = k.flatten(0, 1)[flat].unflatten(0, (-1, width))
            grad_query.append((grad_best.unsqueeze(-2) @ near).squeeze(-2))
            grad_keys = grad_keys.index_add(
                0, flat, (grad_best.unsqueeze(-1) * q[rows].unsqueeze(-2)).flatten(0, 1)
            )
        found.append((torch.cat(grad_query), grad_keys, grad_labels))
    if not found:
        return torch.zeros_like(query), torch.zeros_like(keys), torch.zeros_like(labels)
    grad_query, grad_keys, grad_labels = (torch.stack(parts) for parts in zip(*found, strict=True))
    return (
        _normalize_backward(grad_query.reshape(query.shape), query),
        _normalize_backward(grad_keys.reshape(keys.shape), keys),
        grad_labels.reshape(labels.shape).to(labels.dtype),
    )


def _normalize_backward(grad: Tensor, x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x.to(grad.dtype), dim=-1, keepdim=True)
    unit = x / length.clamp_min(SHORTEST)
    inside = grad - unit * (unit * grad).sum(-1, keepdim=True)
    return (torch.where(length > SHORTEST, inside, grad) / length.clamp_min(SHORTEST)).to(x.dtype)


def _blocks(context: int, query: Tensor) -> tuple[Tensor, ...]:
    return torch.arange(query.shape[-2], device=query.device).split(max(1, BOUND // max(1, context)))


def _elements(query, keys, labels):
    query, keys, labels = _flat(query, keys, labels)
    return zip(
        query.reshape(-1, *query.shape[-2:]),
        keys.reshape(-1, *keys.shape[-3:]),
        labels.reshape(-1, *labels.shape[-2:]),
        strict=True,
    )


def _flat(query, keys, labels):
    dtype = compute_dtype(query.dtype)
    query = normalize(query.to(dtype), dim=-1, eps=SHORTEST).flatten(-3, -2)
    keys = normalize(keys.to(dtype), dim=-1, eps=SHORTEST).flatten(-3, -2)
    return query, keys, labels.flatten(-4, -2)


def _weights(query, keys, rows, radius, topk, temperature, n_global, grid):
    similarity = query.unsqueeze(-3) @ keys.mT
    near = within(*grid, radius, rows)
    frames, positions = keys.shape[-3], keys.shape[-2]
    allowed = torch.cat([
        torch.ones_like(near).expand(min(n_global, frames), *near.shape),
        near.expand(max(frames - n_global, 0), *near.shape),
    ])  # fmt: skip
    similarity = similarity.masked_fill(~allowed, -torch.inf).movedim(-3, -2).flatten(-2)
    best, place = similarity.topk(min(topk, frames * positions), dim=-1)
    # A place that is not allowed only comes when fewer than topk are: its weight is 0.
    return (best / temperature).softmax(-1), place


def _mix(query, keys, labels, rows, *settings):
    weight, place = _weights(query, keys, rows, *settings)
    dtype = torch.promote_types(weight.dtype, compute_dtype(labels.dtype))
    expanded = labels.to(dtype).unsqueeze(-3).expand(*place.shape[:-1], *labels.shape[-2:])
    chosen = expanded.gather(-2, place.unsqueeze(-1).expand(*place.shape, labels.shape[-1]))
    return (weight.to(dtype).unsqueeze(-1) * chosen).sum(-2).to(labels.dtype)
