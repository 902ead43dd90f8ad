"""How little a position resembles what lies along the border of the frames.

Background reaches the border of a frame more often than an object does, over a whole video almost always. So a
position that looks like much of the border is background, whatever it is; the boundary prior of salient object
detection (Wei et al., "Geodesic Saliency Using Background Priors", ECCV 2012), on features and over time.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CAPACITY = 1000
"""Positions of the border that are kept for comparison."""
_SHARE = 0.2
"""Share of them that a position must resemble to count as background: some, since borders differ, but more than an
object covers that now and then leaves the frame."""
_BINS = 1024
_LARGEST = 2.0
"""The contrast of opposite features."""


def border(size: tuple[int, int]) -> Tensor:
    """(h * w,): 1 on the left, right and upper border of the grid.

    The lower border does not count: objects that stand on the ground in front of the camera reach it.
    """
    edge = torch.zeros(size)
    edge[0] = edge[:, 0] = edge[:, -1] = 1
    return edge.flatten()


class BorderContrast:
    """Contrast of the positions of a video, in two passes over its frames: `observe` all, then call with each.

    A frame is compared with a fixed-size uniform sample of the border positions of the whole video. The sample is
    seeded: the same video gives the same contrast.
    """

    def __init__(self):
        self._generator = torch.Generator().manual_seed(0)
        self._sample: Tensor | None = None
        self._order = torch.empty(0)
        self._counts = torch.zeros(_BINS, dtype=torch.float64)

    def observe(self, features: Tensor, grid: tuple[int, int]) -> None:
        """Take note of the border of T frames with features (T, h * w, D) of unit length on a grid (h, w)."""
        self._extend(features[:, border(grid).bool().to(features.device)].flatten(0, 1))

    def __call__(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Contrast (h, w) of a frame: 1 minus the mean cosine to the most similar fifth of the border.

        Args:
            features: (h * w, D) of unit length.
            grid: (h, w).
        """
        nearest = max(1, round(_SHARE * len(self._sample)))
        contrast = 1 - (features @ self._sample.T).topk(nearest, dim=1).values.mean(1)
        self._counts += torch.histc(contrast.double().cpu(), _BINS, 0, _LARGEST)
        return contrast.unflatten(0, grid)

    def _extend(self, new: Tensor) -> None:
        # The positions with the least random numbers are a uniform sample, however many there have been.
        drawn = torch.rand(len(new), generator=self._generator)
        order = torch.cat([self._order, drawn])
        sample = new if self._sample is None else torch.cat([self._sample, new])
        kept = order.argsort()[:_CAPACITY]
        self._order, self._sample = order[kept], sample[kept.to(sample.device)]

    def range(self) -> tuple[float, float]:
        """The typical contrast of the frames measured, their median, and that of the most salient positions.

        The latter is exceeded by one position in 200, few enough for a small object, too many for chance.
        """
        share = self._counts.cumsum(0) / self._counts.sum().clamp(min=1)
        width = _LARGEST / _BINS
        low, high = ((int(torch.searchsorted(share, level)) + 0.5) * width for level in (0.5, 0.995))
        return low, max(high, low + width)
