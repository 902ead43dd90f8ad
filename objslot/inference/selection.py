"""From regions to objects without labels: which regions are foreground, and which belong together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from objslot.data.segmentation import MAX_TRACKS
from objslot.inference.regions import RegionStatistics

_LEAST_MASS = 1e-4
"""Regions under this share of the video are never foreground: they own no position for certain."""
_THRESHOLD = 0.2
"""Where foreground starts, between the typical position (0) and the most salient region (1)."""
_SINGLE_THRESHOLD = 0.6
"""The same where there is one object to find: what stands out less is not it."""


class Selection(NamedTuple):
    """Track numbers of regions, and what is said of the tracks."""

    track: Tensor
    """(R,): track of each region, 1 to `MAX_TRACKS`, or 0 where there were too many."""
    foreground: tuple[int, ...]
    """Tracks called foreground, most salient first."""
    scores: dict[int, float]
    """Salience of each track: 0 is the typical position of the video, 1 the most salient region."""


def salience(statistics: RegionStatistics) -> Tensor:
    """(R,) salience of regions: 0 for the typical position of the video, 1 for the most salient region.

    A region is salient when its features, of unit length, point away from the video's mean feature and it keeps
    clear of the border. The typical position is the median over positions,
    so that a background made of many regions counts by its area and not by their number.
    """
    mass = statistics.mass
    mean = F.normalize((mass[:, None] * statistics.feature).sum(0), dim=0)
    salient = (1 - statistics.feature @ mean) * (1 - statistics.border).clamp(min=0).square()
    present = mass > _LEAST_MASS
    salient = salient.masked_fill(~present, salient[present].min() if present.any() else 0.0)
    typical = _weighted_median(salient, mass)
    return (salient - typical) / (salient.max() - typical).clamp(min=1e-6)


def select(statistics: RegionStatistics, semantics: Tensor, *, merge_foreground: bool = False) -> Selection:
    """Tracks of the regions (R,), which are instances of `semantics` (R,).

    Background instances of one semantics are one track; each foreground region is a track of its own, or all are
    one with `merge_foreground`, the convention of data sets with a single object. At most `MAX_TRACKS` tracks
    remain, the foreground first and then the largest.
    """
    salient = salience(statistics)
    threshold = _SINGLE_THRESHOLD if merge_foreground else _THRESHOLD
    foreground = (salient > threshold) & (statistics.mass > _LEAST_MASS)
    if merge_foreground:
        groups = torch.where(foreground, -1, semantics)
    else:
        groups = torch.where(foreground, -1 - torch.arange(len(semantics)), semantics)
    names, group = groups.unique(return_inverse=True)
    n_groups = len(names)
    mass = torch.zeros(n_groups).index_add_(0, group, statistics.mass)
    weighted = torch.zeros(n_groups).index_add_(0, group, statistics.mass * salient)
    score = weighted / mass.clamp(min=1e-12)
    is_foreground = names < 0
    rank = torch.where(is_foreground, 2 + score, mass)
    order = rank.argsort(descending=True)[:MAX_TRACKS]
    number = torch.zeros(n_groups, dtype=torch.long)
    number[order] = torch.arange(1, len(order) + 1)
    return Selection(
        track=number[group],
        foreground=tuple(int(number[g]) for g in order if is_foreground[g]),
        scores={int(number[g]): float(score[g]) for g in order},
    )


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    order = values.argsort()
    total = weights[order].cumsum(0)
    return values[order[torch.searchsorted(total, total[-1] / 2).clamp(max=len(order) - 1)]]
