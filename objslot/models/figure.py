"""What a model has learned of figure and ground: a correction of the label-free rule, from a position's key."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_REACH = 0.35
"""Distance between keys of unit length over which a correction carries: that of keys of one part of an object."""
_RIDGE = 1e-4
"""Weight of the penalty on the weights, over the mean square of a kernel."""
_SAMPLE = 100_000
"""Positions that are compared with the centres at once in fitting, at most."""


class FigureHead(nn.Module):
    """Gaussian kernel regression with a ridge on `centres` keys: f(x) = sum over k of w_k exp(-|x - c_k|^2 / 2 s^2).

    Far from everything it was fitted to it is 0. It has no parameters, only buffers: `centres` (K, D) and
    `weights` (K,).
    """

    def __init__(self, centres: int, width: int):
        super().__init__()
        self.register_buffer("centres", torch.zeros(centres, width))
        self.register_buffer("weights", torch.zeros(centres))

    def forward(self, keys: Tensor) -> Tensor:
        """Keys (..., D) of unit length -> correction (...), of the keys' dtype."""
        return _kernel(keys, self.centres.to(keys.dtype)) @ self.weights.to(keys.dtype)

    @classmethod
    def fit(cls, keys: Tensor, correction: Tensor, *, centres: int, seed: int = 0) -> FigureHead:
        """The head that comes closest to `correction` (M,), floating point, at keys (M, D) of unit length.

        The centres are some of the keys, drawn from `seed`; there are fewer where there are fewer keys.
        """
        order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).to(keys.device)
        head = cls(min(centres, len(keys)), keys.shape[1]).to(keys.device)
        head.centres.copy_(keys[order[:centres]])
        square = keys.new_zeros(len(head.centres), len(head.centres), dtype=torch.float64)
        target = square.new_zeros(len(head.centres))
        chosen = order[:_SAMPLE]
        for part in chosen.split(8192):
            kernel = _kernel(keys[part].float(), head.centres)
            square += kernel.T @ kernel
            target += kernel.T @ correction[part].float()
        square.diagonal().add_(_RIDGE * square.diagonal().mean())
        head.weights.copy_(torch.linalg.solve(square, target))
        return head


def _kernel(keys: Tensor, centres: Tensor) -> Tensor:
    return torch.exp(torch.cdist(keys, centres).square() / (-2 * _REACH**2))
