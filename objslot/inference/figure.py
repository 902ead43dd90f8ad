"""Telling the one object of a video from the ground: by the contrast of appearance, and by what moves.

Contrast (`figure_evidence`) knows no motion; motion shows what moves otherwise than the camera, but only now and then
and not sharply. Both put together, frame by frame, teach a linear function of the features what is figure in this
video, which keeps what holds for an appearance and forgets the chance of a frame. The idea is that of Pathak et al.,
"Learning Features by Watching Objects Move", CVPR 2017, with one video in place of many.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from objslot.data import Video
from objslot.inference.motion import own_motion
from objslot.inference.regions import VideoRegions
from objslot.inference.selection import FIGURE_THRESHOLD, figure_evidence
from objslot.inference.spool import MaskSpool

_RIDGE = 1.0
"""Weight of the penalty on the linear function, over the mean variance of a feature."""


def find_figure(regions: VideoRegions, video: Video, *, spool_in: Path | None = None) -> MaskSpool:
    """For each of T frames (1, h, w), half precision: evidence that a position is figure; above 0 it is.

    The mean of what is taught and of what is learned from that. The video is read once; memory does not grow with its
    length, see `MaskSpool` for `spool_in`.
    """
    contrast, taught, found = (MaskSpool(spool_in) for _ in range(3))
    for t, masks in enumerate(regions.masks):
        contrast.append((figure_evidence(regions, t, masks) + FIGURE_THRESHOLD).clamp(0, 1)[None, None])
    learner = _Ridge()
    for t, moving in enumerate(own_motion(video, contrast)):
        target = teach(contrast[t].float(), moving[None])
        taught.append(target[None])
        learner.add(regions.features[t].float(), target.flatten())
    learned = learner.solve()
    for t, target in enumerate(taught):
        known = learned(regions.features[t].float()).view_as(target)
        found.append(((target.float() + known) / 2 - FIGURE_THRESHOLD)[None])
    return found


def teach(contrast: Tensor, moving: Tensor) -> Tensor:
    """What is figure by contrast and by motion, a frame's motion counting as far as it agrees with the contrast there.

    Motion says nothing in a frame in which nothing moves, or the camera moves too fast, or the object fills the frame;
    then the two do not correlate.

    Args:
        contrast: (T, h, w), from 0 for ground to 1 for figure.
        moving: (T, h, w), the same of motion.

    Returns:
        (T, h, w): (contrast + w * moving) / (1 + w), where w is the frame's correlation of the two, or 0 if that is
        less.
    """
    first, second = (maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True) for maps in (contrast, moving))
    norms = first.norm(dim=1) * second.norm(dim=1)
    weight = ((first * second).sum(1) / norms.clamp(min=1e-6)).clamp(min=0)[:, None, None]
    return (contrast + weight * moving) / (1 + weight)


class _Ridge:
    """Linear regression with a ridge, from one part of the data after the other."""

    def __init__(self):
        self._count, self._sum, self._level = 0, 0.0, 0.0
        self._square, self._product = 0.0, 0.0

    def add(self, features: Tensor, target: Tensor) -> None:
        """Take note of features (M, D) and what they should give (M,)."""
        self._count += len(features)
        self._sum = self._sum + features.sum(0).double()
        self._level += float(target.double().sum())
        self._square = self._square + (features.T @ features).double()
        self._product = self._product + (features.T @ target).double()

    def solve(self) -> Callable[[Tensor], Tensor]:
        """The function that comes closest: features (M, D) -> (M,)."""
        middle, level = self._sum / self._count, self._level / self._count
        square = self._square / self._count - middle[:, None] * middle
        slope = self._product / self._count - level * middle
        square.diagonal().add_(_RIDGE * square.diagonal().mean().clamp(min=1e-12))
        slope = torch.linalg.solve(square, slope)
        offset = level - middle @ slope
        return lambda features: features @ slope.float() + float(offset)
