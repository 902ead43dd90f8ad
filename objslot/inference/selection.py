"""From regions to objects without labels: which regions are foreground, and which belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from objslot.data.segmentation import MAX_TRACKS
from objslot.inference.regions import RegionStatistics, VideoRegions

_LEAST_MASS = 1e-4
"""Regions under this share of the video are never foreground: they own no position for certain."""
_THRESHOLD = 0.2
"""Where foreground starts, between the typical position (0) and the most salient region (1)."""
FIGURE_THRESHOLD = 0.5
"""Where the one object starts, between the typical contrast to the border (0) and that of the most salient positions
(1)."""


class Selection(NamedTuple):
    """Track numbers of regions, and what is said of the tracks."""

    track: Tensor
    """(R,): track of each region, 1 to `MAX_TRACKS`, or 0 where there were too many."""
    foreground: tuple[int, ...]
    """Tracks called foreground, the largest first."""
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


def salient_regions(statistics: RegionStatistics) -> tuple[Tensor, Tensor]:
    """(R,) salience, see `salience`, and bool (R,), which regions that makes foreground."""
    salient = salience(statistics)
    return salient, (salient > _THRESHOLD) & (statistics.mass > _LEAST_MASS)


def select(statistics: RegionStatistics, semantics: Tensor, objects: Mapping[int, float]) -> Selection:
    """Tracks where there may be several objects: the objects, and what each semantics has in the background.

    At most `MAX_TRACKS` tracks remain, the objects first and then the largest. `Selection.track` is 0 for foreground
    regions, whose positions belong to one object or the other.

    Args:
        statistics: of the regions.
        semantics: (R,), what each region is an instance of.
        objects: the salience of each object, numbered from 1, at most `MAX_TRACKS`.
    """
    salient, foreground = salient_regions(statistics)
    n_semantics = int(semantics.max()) + 1
    mass = torch.zeros(n_semantics).index_add_(0, semantics, statistics.mass * ~foreground)
    weighted = torch.zeros(n_semantics).index_add_(0, semantics, statistics.mass * ~foreground * salient)
    score = weighted / mass.clamp(min=1e-12)
    number, order = _numbered(mass)
    number = torch.where((number > 0) & (mass > 0), number + len(objects), 0)
    number[number > MAX_TRACKS] = 0
    return Selection(
        track=torch.where(foreground, 0, number[semantics]),
        foreground=tuple(objects),
        scores={**objects, **{int(number[g]): float(score[g]) for g in order if number[g] > 0}},
    )


def select_figure(statistics: RegionStatistics, semantics: Tensor) -> Selection:
    """Tracks where there is one object: the figure, and what each semantics has outside it.

    The tracks are those of R + N labels: the R regions inside the figure, all track 1, then the N semantics outside
    it, of which the largest remain. Which positions are figure says `find_figure`.
    """
    n_semantics = int(semantics.max()) + 1
    mass = torch.zeros(n_semantics).index_add_(0, semantics, statistics.mass)
    weighted = torch.zeros(n_semantics).index_add_(0, semantics, statistics.mass * statistics.contrast)
    contrast = weighted / mass.clamp(min=1e-12)
    number, order = _numbered(torch.cat([mass.new_full((1,), 2.0), mass]))
    track = torch.cat([number[:1].expand(len(semantics)), number[1:]])
    scores = {int(number[g]): float(contrast[g - 1]) for g in order if g > 0}
    return Selection(track, (1,), {1: 1.0, **scores})


def figure_evidence(regions: VideoRegions, t: int, masks: Tensor) -> Tensor:
    """(h, w) evidence that a position of frame t, with `masks` (R, h, w), belongs to the object: above 0 it does.

    The mean of two opinions on how much it contrasts with the border of the video, its own and that of the regions it
    lies in: alone, a position sees no further than its patch, and a region may hold more than the object. Motion is
    no part of it, see `find_figure`.
    """
    low, high = regions.contrast_range
    own = (regions.contrast[t][0].float() - low) / (high - low)
    shared = torch.tensordot(regions.statistics.contrast, masks.float(), 1)
    return (own + shared) / 2 - FIGURE_THRESHOLD


def _numbered(rank: Tensor) -> tuple[Tensor, Tensor]:
    """Track numbers from 1 by falling rank, 0 for those that are too many; and the ranked, in that order."""
    order = rank.argsort(descending=True)[:MAX_TRACKS]
    number = torch.zeros(len(rank), dtype=torch.long)
    number[order] = torch.arange(1, len(order) + 1)
    return number, order


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    order = values.argsort()
    total = weights[order].cumsum(0)
    return values[order[torch.searchsorted(total, total[-1] / 2).clamp(max=len(order) - 1)]]
