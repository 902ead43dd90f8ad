"""Labels carried to a new frame by its nearest features among context frames."""

import torch
from torch import Tensor

from objslot.ops import _autocast, _checks
from objslot.ops.propagate import autograd
from objslot.ops.slot_softmax import check_sizes

__all__ = ["facts", "propagate"]


def propagate(
    query: Tensor,
    keys: Tensor,
    labels: Tensor,
    *,
    radius: int,
    topk: int,
    temperature: float,
    n_global: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Label propagation of Contrastive Random Walk (Jabri et al. 2020, appendix on label propagation).

    Features are L2-normalised. For every position of the query frame: the cosine to the positions of the context
    frames, the `topk` largest of all frames together, a softmax of cosine / temperature over these, and the
    labels there mixed with these weights. The affinity is never held in full.

    Args:
        query: (..., h, w, d), features of the frame to label; float16, bfloat16, float32 or float64. Half
            precision is computed in float32.
        keys: (..., l, h, w, d), features of the l context frames, dtype and device of query.
        labels: (..., l, h, w, c), any of the four dtypes: c soft labels of every position.
        radius: at least 1, in positions; only positions of a context frame whose Euclidean distance on the grid
            is below it take part.
        topk: at least 1; all positions that take part, where they are fewer.
        temperature: above 0.
        n_global: the first so many context frames take part everywhere, whatever the radius. At least 0.
        backend: see `objslot.use_backend`; None leaves the choice to the context, the environment and the shapes.

    Leading dimensions of all three are the same.

    Returns:
        labels of the query frame (..., h, w, c), dtype of labels. Between equal cosines at the edge of the topk
        the choice is the backend's.

    Gradients: query, keys and labels, exact, through the reference (the choice of the topk is constant).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, radius or topk below 1, temperature not above 0, n_global below 0.
        BackendError: the backend asked for by name cannot serve the call.
    """
    _checks.tensor("query", query, "(..., h, w, d)")
    _checks.tensor("keys", keys, "(..., l, h, w, d)")
    _checks.tensor("labels", labels, "(..., l, h, w, c)")
    query, keys = _autocast.cast(query, keys)
    _checks.floating("query", query)
    _checks.like("keys", keys, "query", query)
    _checks.floating("labels", labels)
    if labels.device != query.device:
        raise ValueError(f"labels: expected device {query.device}, that of query, got {labels.device}")
    check_sizes("keys", keys.shape, frames=-4)
    check_sizes("query", query.shape, rows=-3, columns=-2, features=-1)
    *batch, height, width, features = query.shape
    frames, classes = keys.shape[-4], labels.shape[-1]
    _checks.shape("keys", keys, (*batch, frames, height, width, features), "(..., l, h, w, d)")
    _checks.shape("labels", labels, (*batch, frames, height, width, classes), "(..., l, h, w, c)")
    _checks.at_least("radius", radius, 1)
    _checks.at_least("topk", topk, 1)
    _checks.positive("temperature", temperature)
    _checks.at_least("n_global", n_global, 0)
    return torch.ops.objslot.propagate(query, keys, labels, radius, topk, temperature, n_global, backend)


def facts(
    query: Tensor,
    keys: Tensor,
    labels: Tensor,
    *,
    radius: int,
    topk: int,
    temperature: float,
    n_global: int = 1,
) -> dict:
    """What decides the backend of `propagate(query, keys, labels, ...)`."""
    return autograd.facts(query, keys, labels, radius, topk)
