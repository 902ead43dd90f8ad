"""What a page shows beside the tracks: the semantic map of a frame, and attention after every iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from objslot.data import Video
from objslot.inference.regions import VideoRegions, frame_size, normalise
from objslot.inference.segment import strongest_region
from objslot.models import SMTC

LARGEST_SIDE = 512


@dataclass(frozen=True)
class DisplayMaps:
    """Maps for people to look at; any size, since they are scaled to the frame.

    Attributes:
        semantic: gives frame t's strongest semantics at every position, uint8 (h, w), counted from 1.
        attention: for some frames, by number, the attention of N slots after each of I iterations, uint8
            (I, N, h, w); 255 is the largest value of a slot over the iterations of that frame.
    """

    semantic: Callable[[int], np.ndarray] | None = None
    attention: Mapping[int, np.ndarray] = field(default_factory=dict)


def display_maps(
    model: SMTC, video: Video, regions: VideoRegions, frames: Iterable[int], *, iterations: int | None = None
) -> DisplayMaps:
    """Maps of a video whose regions `model_regions` found.

    Args:
        model: the model that found them.
        video: the frames.
        regions: the regions, which know the semantics that each belongs to.
        frames: the frames whose attention is kept.
        iterations: slot attention iterations; as in training by default.
    """
    groups = int(regions.semantics.max()) + 1
    scale = min(1.0, LARGEST_SIDE / max(video.size))
    size = tuple(max(1, round(side * scale)) for side in video.size)

    def semantic(t: int) -> np.ndarray:
        masks = regions.masks[t].float()
        summed = masks.new_zeros(groups, *masks.shape[1:]).index_add_(0, regions.semantics, masks)
        return strongest_region(summed, size).numpy()

    return DisplayMaps(semantic, {t: _attention(model, video, t, iterations) for t in frames})


@torch.no_grad()
def _attention(model: SMTC, video: Video, t: int, iterations: int | None) -> np.ndarray:
    neighbour = [t - 1, t] if t > 0 else [0, 1][: video.n_frames]
    parameter = next(model.parameters())
    size = frame_size(model.encoder, video.size, min(model.frame_size))
    clip = normalise(video.read(neighbour).to(parameter.device), size).to(parameter.dtype)
    maps = model.segment(model.encode(clip[None]), instances=1, iterations=iterations, return_iterations=True)
    attention = torch.stack([after.semantic[0, neighbour.index(t)] for after in maps.iterations]).float()
    attention = attention / attention.amax((0, 2), keepdim=True).clamp_min(1e-12)
    return (255 * attention).round().to(torch.uint8).unflatten(-1, maps.grid).cpu().numpy()
