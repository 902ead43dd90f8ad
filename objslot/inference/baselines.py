"""What a trained model must beat: clusters of colour, and clusters of the backbone it started from.

Both go through the same selection and the same protocols as the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from objslot.data import Video
from objslot.data.segmentation import VideoSegmentation
from objslot.inference.regions import Progress, RegionSum, VideoRegions, encode_video
from objslot.inference.segment import strongest_region, to_segmentation
from objslot.models.encoder import Encoder, FrameFeatures

COLOUR_CLUSTERS = 16
BACKBONE_CLUSTERS = 8
_COLOUR_GRID_SIDE = 60
"""Shorter side of the frames whose colours are clustered, in pixels."""
_SAMPLE = 40_000
"""Positions that k-means is fitted to; all are assigned."""


def colour_null(
    video: Video, *, clusters: int = COLOUR_CLUSTERS, seed: int = 0, merge_foreground: bool = False
) -> VideoSegmentation:
    """The null model: k-means on colour and position over the whole video, no network at all.

    A position is its RGB colour and its row and column, each scaled to unit variance; only colour tells what is
    salient, since objects tend to stand in the middle and would be the least distinct by place.

    Args:
        video: the frames, read once.
        clusters: number of clusters in the video.
        seed: of the k-means start.
        merge_foreground: as in `segment_video`.

    Raises:
        UserError: a video that cannot be read.
    """
    height, width = video.size
    scale = _COLOUR_GRID_SIDE / min(height, width)
    grid = (max(round(height * scale), 1), max(round(width * scale), 1))
    frames = torch.stack([_shrink(frame, grid) for frame in video.frames()])
    rows, columns = torch.meshgrid(
        torch.linspace(0, 1, grid[0]), torch.linspace(0, 1, grid[1]), indexing="ij"
    )
    place = torch.stack([rows, columns], -1).reshape(1, -1, 2).expand(len(frames), -1, -1)
    features = torch.cat([frames.flatten(1, 2), place], -1)
    features = (features - features.mean((0, 1))) / features.std((0, 1)).clamp(min=1e-6)
    # The constant beside the colour makes its length, not only its hue, change the direction.
    colour = F.normalize(F.pad(frames.flatten(1, 2), (0, 1), value=0.5), dim=-1)
    regions = _clustered(features, colour, grid, clusters, seed)
    found = to_segmentation(regions, video, merge_foreground=merge_foreground)
    # What it takes for figure is mostly wrong: an oracle finds more in clusters that are not cut by that.
    partition = np.stack([strongest_region(masks, video.size).numpy() for masks in regions.masks])
    return dataclasses.replace(found, partition=partition)


@torch.no_grad()
def frozen_backbone(
    encoder: Encoder,
    video: Video,
    *,
    resolution: int,
    clusters: int = BACKBONE_CLUSTERS,
    seed: int = 0,
    merge_foreground: bool = False,
    features: Iterable[FrameFeatures] | None = None,
    progress: Progress | None = None,
) -> VideoSegmentation:
    """The untrained start: k-means on the encoder's unit-length keys over the whole video.

    Args:
        encoder: the model's encoder, or one built by itself.
        video: the frames, read once.
        resolution: shorter side of the frames in pixels.
        clusters: number of clusters in the video.
        seed: of the k-means start.
        merge_foreground: as in `segment_video`.
        features: those of the video from `encode_video`, where they are known already.
        progress: called with (frames done, frames in all).

    Raises:
        UserError: a video that cannot be read, or a resolution under one patch.
    """
    keys, grid = [], (1, 1)
    if features is None:
        features = encode_video(encoder, video, short_side=resolution, progress=progress)
    for chunk in features:
        keys.append(F.normalize(chunk.keys[0].float(), dim=-1).half().cpu())
        grid = chunk.grid
    keys = torch.cat(keys)
    regions = _clustered(keys, keys, grid, clusters, seed)
    return to_segmentation(regions, video, merge_foreground=merge_foreground)


def _clustered(
    features: Tensor,
    described: Tensor,
    grid: tuple[int, int],
    clusters: int,
    seed: int,
) -> VideoRegions:
    """K-means of features (T, HW, D) as soft regions.

    `described` (T, HW, C), of unit length, only serves the selection.
    """
    # Twenty megabytes, which whoever asks for no baselines is spared.
    from scipy.cluster.vq import kmeans2

    flat = features.flatten(0, 1)
    generator = np.random.default_rng(seed)
    sample = flat[torch.from_numpy(generator.permutation(len(flat))[:_SAMPLE])].float()
    clusters = min(clusters, len(sample))
    centres, _ = kmeans2(sample.numpy(), clusters, iter=30, minit="++", seed=generator)
    centres = torch.from_numpy(centres)
    spread = torch.cdist(sample, centres).min(dim=1).values.square().mean().clamp(min=1e-12)
    collected = RegionSum()
    for t, frame in enumerate(features):
        distance = torch.cdist(frame.float(), centres).square() / spread
        mask = (-distance).softmax(-1).T.unflatten(-1, grid)[None]
        collected.add(mask, described[t : t + 1].float())
    return collected.result(torch.arange(clusters))


def _shrink(frame: Tensor, grid: tuple[int, int]) -> Tensor:
    """uint8 (H, W, 3) -> float (h, w, 3) in [0, 1]."""
    small = F.interpolate(frame.permute(2, 0, 1)[None].float(), grid, mode="area")
    return small[0].permute(1, 2, 0) / 255
