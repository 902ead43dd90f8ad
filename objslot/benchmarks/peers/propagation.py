"""Label propagation as users write it: the whole affinity, masked, and its largest entries."""

import torch
from torch import Tensor
from torch.nn import functional as F

from objslot.benchmarks.problem import settings_only, with_compiled


def dense(
    query: Tensor, keys: Tensor, labels: Tensor, radius: int, topk: int, temperature: float, n_global: int
) -> Tensor:
    """query (1, h, w, d), keys (1, l, h, w, d), labels (1, l, h, w, c)."""
    _, frames, height, width, _ = keys.shape
    query, keys = F.normalize(query.float(), dim=-1)[0].flatten(0, 1), F.normalize(keys.float(), dim=-1)[0]
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(query.device)
    far = (grid[:, None] - grid[None]).square().sum(-1) >= radius**2
    mask = far.repeat(1, frames)
    mask[:, : n_global * height * width] = False
    affinity = (query @ keys.flatten(0, 2).T).masked_fill(mask, -torch.inf)
    best, place = affinity.topk(topk, dim=-1)
    weights = (best / temperature).softmax(-1)
    moved = (weights.unsqueeze(-1) * labels[0].float().flatten(0, 2)[place]).sum(1)
    return moved.reshape(1, height, width, -1).to(labels.dtype)


PROPAGATION = with_compiled("whole affinity", settings_only(dense), modes=("default",))
