"""What moves otherwise than the camera: the optical flow that is left when the camera's is taken out.

The flow is that of Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016, by OpenCV. The motion of
the camera, a quadratic function of the place (that of a plane before a moving camera), is fitted to it robustly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from objslot.data import Video

_SHORT_SIDE = 240
"""Shorter side in pixels of the pictures compared."""
_LEAST_SIDE = 16
"""Pictures under this, in pixels, are too small to be compared."""
_JITTER = 0.05
"""Displacement, in pixels, that is never a motion of its own."""
_STILL, _MOVING = 1.0, 4.0
"""Logarithms of 1 plus how many times the typical displacement: where motion of its own begins, and is certain."""


def own_motion(video: Video, figure: Sequence[Tensor]) -> Iterator[Tensor]:
    """How much every place of a frame moves otherwise than the camera, frame by frame; two frames are held in memory.

    It is the less of what the frame before and the frame after say: what the next frame hides seems to move towards it,
    but not towards the frame before.

    Args:
        video: the frames, read once.
        figure: for each frame (1, h, w), from 0 for ground to 1: what is known of the figure, which has next to no say
            in what is the camera's motion.

    Yields:
        (h, w) for each frame, from 0 to 1. All 0 in pictures of less than 16 pixels, or that have no other beside them.
    """
    before, back = None, None
    for t, picture in enumerate(chain(map(_grey, video.frames()), [None])):
        forth = None
        if before is not None:
            if picture is not None and min(picture.shape) >= _LEAST_SIDE:
                forth = _unlike_camera(_flow(before, picture), figure[t - 1])
            said = [maps for maps in (back, forth) if maps is not None]
            moving = torch.stack(said).amin(0) if said else torch.zeros(1, 1)
            moving = F.adaptive_avg_pool2d(moving[None], figure[t - 1].shape[1:])[0]
            yield ((moving - _STILL) / (_MOVING - _STILL)).clamp(0, 1)
        back = None if forth is None else _unlike_camera(_flow(picture, before), figure[t])
        before = picture


def _unlike_camera(flow: Tensor, figure: Tensor) -> Tensor:
    """(height, width): logarithm of 1 plus how far a flow (2, height, width) is from the camera's, over the median."""
    ground = (1 - 1.6 * figure[None].float()).clamp(min=0.02)
    trust = F.interpolate(ground, flow.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    distance = (flow - dominant_flow(flow, trust)).norm(dim=0)
    return torch.log1p(distance / (distance.median() + _JITTER))


def dominant_flow(flow: Tensor, trust: Tensor) -> Tensor:
    """The quadratic function of the place that most of a flow follows.

    Args:
        flow: (2, h, w), floating point.
        trust: (h, w), above 0: how much a place counts.

    Returns:
        (2, h, w).
    """
    rows, columns = flow.shape[1:]
    y, x = torch.meshgrid(
        torch.linspace(-rows / columns, rows / columns, rows), torch.linspace(-1, 1, columns), indexing="ij"
    )
    basis = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1).flatten(0, 1)
    vectors, weight = flow.flatten(1).T, trust.flatten()
    least = 1e-4 * torch.eye(basis.shape[1])
    for _ in range(6):
        weighted = (basis * weight[:, None]).T
        fitted = basis @ torch.linalg.solve(weighted @ basis + least * weight.sum(), weighted @ vectors)
        distance = (vectors - fitted).norm(dim=1)
        # Geman and McClure's weights: what moves otherwise has no say.
        scale = 2 * distance.median() + _JITTER / 2
        weight = trust.flatten() / (1 + (distance / scale).square()).square()
    return fitted.T.unflatten(1, (rows, columns))


def _grey(frame: Tensor) -> np.ndarray:
    """A frame, uint8 (H, W, 3), as grey values (height, width), no larger than motion needs them."""
    import cv2

    scale = min(1.0, _SHORT_SIDE / min(frame.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in frame.shape[:2])
    with _one_thread():
        grey = cv2.cvtColor(frame.numpy(), cv2.COLOR_RGB2GRAY)
        return cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA)


def _flow(picture: np.ndarray, other: np.ndarray) -> Tensor:
    """The flow from one picture to another, (2, h, w), columns then rows, in pixels, at half the pictures' size."""
    import cv2

    with _one_thread():
        flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(picture, other, None)
    return F.avg_pool2d(torch.from_numpy(flow).permute(2, 0, 1), 2)


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenCV on one thread: its flow depends on their number, and its threads do not survive a fork."""
    # Half a second, which whoever asks for no motion is spared.
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
