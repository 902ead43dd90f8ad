"""Learning what is figure from videos without labels: from the label-free rule, and from what moves.

The rule (`figure_evidence`) knows no motion and sees one video at a time. Here its opinion on the training videos is
put together with motion, which shows what moves otherwise than the camera, but only now and then and not sharply; a
head fitted to how much that differs from the rule, over all positions of all videos, keeps what holds for an
appearance and forgets the chance of a frame. Then a frame alone is enough. The idea is that of Pathak et al.,
"Learning Features by Watching Objects Move", CVPR 2017, with a head in place of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from objslot.data import Video
from objslot.errors import UserError
from objslot.inference.motion import motion
from objslot.inference.regions import CHUNK, Progress, frame_size, normalise
from objslot.inference.segment import model_regions
from objslot.inference.selection import FIGURE_THRESHOLD, figure_evidence
from objslot.models import SMTC
from objslot.models.encoder import FrameFeatures
from objslot.models.figure import FigureHead

_LEAST_FRAMES = 8
"""Frames of a video; with more videos than that allows, some are left out."""
_CENTRES = 100
"""Centres of the head for each video."""
_MOST_CENTRES = 2048
_MOTION_SIDE = 240
"""Shorter side to which frames are brought before their motion is measured."""

Features = Callable[[Video, Sequence[int]], Iterable[FrameFeatures]]


@torch.no_grad()
def learn_figure(
    model: SMTC,
    videos: Sequence[Video],
    *,
    frames: int,
    features: Features | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> FigureHead | None:
    """A head that corrects the rule by what moved in the training videos, for `SMTC.figure`.

    Args:
        model: a trained model.
        videos: the training videos; one that cannot be read, or has a single frame, is passed over.
        frames: how many frames to learn from, of all videos together, evenly spread.
        features: gives the features of some frames of a video, as chunks of clips; by default they are encoded.
        seed: of the head's centres.
        progress: called with (videos done, videos in all).

    Returns:
        The head, or None where there was nothing to learn from.
    """
    step = max(1, -(-_LEAST_FRAMES * len(videos) // frames))
    chosen = videos[::step]
    each = max(_LEAST_FRAMES, frames // max(1, len(chosen)))
    keys, corrections = [], []
    for done, video in enumerate(chosen, 1):
        try:
            if video.n_frames > 1:
                found = _lesson(model, video, _spread(video.n_frames, each), features or _encoder(model))
                keys.append(found[0].half())
                corrections.append(found[1])
        except UserError:
            # Training has said so already, and goes on without the video too.
            pass
        if progress is not None:
            progress(done, len(chosen))
    if not keys:
        return None
    centres = min(_MOST_CENTRES, _CENTRES * len(keys))
    return FigureHead.fit(torch.cat(keys), torch.cat(corrections), centres=centres, seed=seed)


def teach(rule: Tensor, moving: Tensor) -> Tensor:
    """What is figure by the rule and by motion, a frame's motion counting as far as it agrees with the rule there.

    Motion says nothing in a frame in which nothing moves, or the camera moves too fast, or the object fills the frame;
    then the two do not correlate.

    Args:
        rule: (T, h, w), from 0 for ground to 1 for figure.
        moving: (T, h, w), the same of motion.

    Returns:
        (T, h, w): (rule + w * moving) / (1 + w), where w is the frame's correlation of the two, or 0 if that is less.
    """
    first, second = (maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True) for maps in (rule, moving))
    norms = first.norm(dim=1) * second.norm(dim=1)
    weight = ((first * second).sum(1) / norms.clamp(min=1e-6)).clamp(min=0)[:, None, None]
    return (rule + weight * moving) / (1 + weight)


def _lesson(model: SMTC, video: Video, places: list[int], features: Features) -> tuple[Tensor, Tensor]:
    """Keys (M, D) of unit length of the positions of some frames, and how far the rule is off (M,)."""
    held = list(features(video, places))
    # What a head has learned before is not the rule.
    regions = model_regions(model, video, features=held)._replace(correction=None)
    rule = torch.stack([figure_evidence(regions, t, masks) for t, masks in enumerate(regions.masks)])
    rule = (rule + FIGURE_THRESHOLD).clamp(0, 1)
    moving = _moving(video, places, rule, next(model.parameters()).device)
    keys = torch.cat([F.normalize(chunk.keys[0].float(), dim=-1) for chunk in held])
    return keys.flatten(0, 1), (teach(rule, moving) - rule).flatten().to(keys.device)


def _moving(video: Video, places: list[int], rule: Tensor, device: torch.device) -> Tensor:
    """(T, h, w) from 0 to 1: motion of its own at `places`, the less of that to the frame before and the one after.

    What the next frame hides seems to move towards it, but not towards the frame before.
    """
    ground = (1 - 1.6 * rule).clamp(min=0.02).to(device)
    found = []
    for part in range(0, len(places), CHUNK):
        chunk = places[part : part + CHUNK]
        here = _pictures(video, chunk, device)
        trust = ground[part : part + CHUNK]
        both = []
        for step in (-1, 1):
            # The first frame has none before it, the last none after.
            beside = [t + step if 0 <= t + step < video.n_frames else t - step for t in chunk]
            both.append(motion(here, _pictures(video, beside, device), trust))
        found.append(F.adaptive_avg_pool2d(torch.minimum(*both), tuple(rule.shape[-2:])).cpu())
    moving = torch.cat(found)
    low, high = np.quantile(moving.numpy(), (0.5, 0.995)).tolist()
    return ((moving - low) / max(high - low, 1e-6)).clamp(0, 1)


def _pictures(video: Video, places: list[int], device: torch.device) -> Tensor:
    """Frames (T, 3, H, W) in [0, 1], no larger than motion needs them."""
    small = []
    for frame in video.read(places):
        colours = frame.to(device).permute(2, 0, 1)[None].float() / 255
        scale = min(1.0, _MOTION_SIDE / min(colours.shape[-2:]))
        small.append(F.interpolate(colours, scale_factor=scale, mode="area"))
    return torch.cat(small)


def _spread(n: int, count: int) -> list[int]:
    """`count` of the numbers 0 to n - 1, or all of them, evenly spread."""
    return sorted({round(place) for place in torch.linspace(0, n - 1, min(n, count)).tolist()})


def _encoder(model: SMTC) -> Features:
    def encode(video: Video, places: Sequence[int]) -> Iterator[FrameFeatures]:
        parameter = next(model.parameters())
        size = frame_size(model.encoder, video.size, min(model.frame_size))
        for part in range(0, len(places), CHUNK):
            frames = normalise(video.read(places[part : part + CHUNK]).to(parameter.device), size)
            yield model.encode(frames[None].to(parameter.dtype))

    return encode
