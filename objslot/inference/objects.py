"""The objects of a whole video: its foreground regions, cut up and joined so that an object is one track."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from objslot.inference.linking import ObjectLinker
from objslot.inference.regions import VideoRegions
from objslot.inference.spool import MaskSpool

_LEAST_FRAMES = 5
"""Frames that show an object at least; a quarter of the video where that is less."""
_LEAST_SIZE = 4
"""Positions that an object has in the frames that show it, on average, unless it is much of the foreground."""
_LEAST_SHARE = 0.01
"""Share of the video's foreground from which a small object counts too."""


_SAME_KIND = 0.7
"""Cosine, away from the video's mean feature, from which regions may be parts of one object."""


class FoundObjects(NamedTuple):
    """Objects of a video, numbered from 1, the largest first."""

    kinds: Tensor
    """(R,): the kind of each region, 0 for background; an object has regions of one kind."""
    labels: Sequence[Tensor]
    """For each of T frames (1, h, w), int32: a number at every position of the foreground, see `number`."""
    number: dict[int, int]
    """The object that a number in `labels` means; numbers that are missing mean none."""
    scores: dict[int, float]
    """Mean salience of each object's positions."""

    def frame(self, t: int) -> Tensor:
        """(h, w): the object at every position of frame t, 0 where there is none."""
        labels = self.labels[t][0]
        found = torch.zeros_like(labels, dtype=torch.uint8)
        for name in labels.unique().tolist():
            found[labels == name] = self.number.get(name, 0)
        return found


def find_objects(
    regions: VideoRegions, salience: Tensor, foreground: Tensor, *, most: int, spool_in: Path | None = None
) -> FoundObjects:
    """Cuts the foreground of a video into objects that keep their number.

    Args:
        regions: the regions of the video.
        salience: (R,), of the regions.
        foreground: bool (R,), the regions that are foreground.
        most: objects at most; the largest are kept.
        spool_in: as for `MaskSpool`.
    """
    statistics = regions.statistics
    middle = (statistics.mass[:, None] * statistics.feature).sum(0)
    kinds = object_kinds(statistics.feature - middle, statistics.mass, foreground.nonzero().flatten().tolist())
    linker = ObjectLinker()
    # The first pass learns what there is, the second knows it from the first frame on.
    for _ in range(2):
        linker.restart()
        labels, tally = MaskSpool(spool_in, dtype=torch.int32), _Tally()
        for t in range(len(regions.masks)):
            masks = regions.masks[t]
            strongest = masks.max(0).indices
            features = F.normalize(regions.features[t].float() - middle, dim=-1).unflatten(0, strongest.shape)
            found = linker(kinds[strongest], features)
            labels.append(found[None, None])
            tally.add(found, salience[strongest])
        same = linker.join()
    number, scores = tally.objects(same, most)
    return FoundObjects(kinds, labels, number, scores)


def object_kinds(features: Tensor, mass: Tensor, foreground: Sequence[int]) -> Tensor:
    """Which foreground regions may be parts of one object: those whose features point the same way.

    Regions join the two most alike first, each group standing for its mean, until none are alike.

    Args:
        features: (R, D), mean features of the regions, less that of the whole video.
        mass: (R,), how much of the video each region is.
        foreground: the regions that count.

    Returns:
        (R,), the number of each region's kind from 1, 0 for the others.
    """
    groups = [[int(r)] for r in foreground]
    sums = [features[r] * mass[r] for (r,) in groups]
    while len(groups) > 1:
        directions = F.normalize(torch.stack(sums), dim=1)
        cosines = (directions @ directions.T).fill_diagonal_(-2)
        i, j = sorted(divmod(int(cosines.argmax()), len(groups)))
        if cosines[i, j] < _SAME_KIND:
            break
        groups[i] += groups.pop(j)
        sums[i] = sums[i] + sums.pop(j)
    kinds = torch.zeros(len(features), dtype=torch.long)
    for number, group in enumerate(groups, start=1):
        kinds[group] = number
    return kinds


class _Tally:
    """Area, salience and frames of the numbers that a linker gives."""

    def __init__(self):
        self._frames = 0
        self._seen: dict[int, list[float]] = {}

    def add(self, labels: Tensor, salience: Tensor) -> None:
        self._frames += 1
        for name in labels.unique().tolist():
            at = labels == name
            seen = self._seen.setdefault(name, [0, 0, 0])
            for k, value in enumerate((int(at.sum()), float(salience[at].sum()), 1)):
                seen[k] += value

    def objects(self, same: dict[int, int], most: int) -> tuple[dict[int, int], dict[int, float]]:
        """The object of each number, and the objects' mean salience."""
        joined: dict[int, list[float]] = {}
        for name, seen in self._seen.items():
            if name in same:
                held = joined.setdefault(same[name], [0, 0, 0])
                for k in range(3):
                    held[k] += seen[k]
        whole = sum(area for area, _, _ in joined.values())
        least_frames = min(_LEAST_FRAMES, math.ceil(self._frames / 4))
        kept = {
            name: seen
            for name, seen in joined.items()
            if seen[2] >= least_frames and (seen[0] >= _LEAST_SIZE * seen[2] or seen[0] >= _LEAST_SHARE * whole)
        }
        ranked = sorted(kept, key=lambda name: -kept[name][0])[:most]
        number = {name: i for i, name in enumerate(ranked, start=1)}
        scores = {i: kept[name][1] / kept[name][0] for name, i in number.items()}
        return {name: number[same[name]] for name in same if same[name] in number}, scores


def draw_objects(
    found: Tensor, kinds: Tensor, drawn_kinds: Tensor, strongest_region: Callable[[Tensor], Tensor]
) -> Tensor:
    """Objects of a coarse grid at the size of a picture whose kinds are known pixel by pixel.

    Args:
        found: uint8 (h, w), numbers of objects, 0 for none.
        kinds: (h, w), the kinds there.
        drawn_kinds: (H, W), the kinds of the picture.
        strongest_region: draws masks (R, h, w) at the size of the picture, see `segment.strongest_region`.

    Returns:
        uint8 (H, W).
    """
    drawn = torch.zeros(drawn_kinds.shape, dtype=torch.uint8)
    for kind in kinds.unique().tolist():
        here = kinds == kind
        names, numbered = found[here].unique(return_inverse=True)
        if kind == 0 or not names.any():
            continue
        at = drawn_kinds == kind
        if len(names) == 1:
            drawn[at] = names[0]
            continue
        # Beyond its own positions a kind goes on as the nearest of them.
        label = torch.zeros_like(found, dtype=torch.long)
        label[here] = numbered
        nearest = ndimage.distance_transform_edt((~here).numpy(), return_distances=False, return_indices=True)
        filled = label[tuple(torch.from_numpy(nearest))]
        shares = F.one_hot(filled, len(names)).permute(2, 0, 1).float()
        drawn[at] = names[strongest_region(shares)[at].long() - 1]
    return drawn
