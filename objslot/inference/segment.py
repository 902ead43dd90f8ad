"""Segmenting a video with a trained model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from objslot.data import Video
from objslot.data.segmentation import VideoSegmentation
from objslot.errors import UserError
from objslot.inference.regions import (
    InstanceLinker,
    Progress,
    StatisticsSum,
    VideoRegions,
    encode_video,
)
from objslot.inference.selection import select
from objslot.models import SMTC

_LARGEST_PARTITION = 255


def segment_video(
    model: SMTC,
    video: Video,
    *,
    instances: int | None = None,
    iterations: int | None = None,
    resolution: int | None = None,
    seed: int = 0,
    merge_foreground: bool = False,
    progress: Progress | None = None,
) -> VideoSegmentation:
    """Find the objects of a video, without any label.

    Args:
        model: a trained model.
        video: the frames, read once from the first to the last.
        instances: instances P of each semantics; as in training by default.
        iterations: slot attention iterations I; as in training by default.
        resolution: shorter side of the frames in pixels, cut to whole patches; as in training by default.
        seed: of the noise that instances start from, one draw for the whole video.
        merge_foreground: make one object of everything that is called foreground, the convention of data sets
            with a single object.
        progress: called with (frames done, frames in all).

    Returns:
        Tracks and partition at the size of the video. The partition holds the instances A[n] * M[n, p] of all
        semantics.

    Raises:
        UserError: a video that cannot be read, counts below 1, or a resolution under one patch.
    """
    regions = model_regions(
        model,
        video,
        instances=instances,
        iterations=iterations,
        resolution=resolution,
        seed=seed,
        progress=progress,
    )
    return to_segmentation(regions, video, merge_foreground=merge_foreground)


@torch.no_grad()
def model_regions(
    model: SMTC,
    video: Video,
    *,
    instances: int | None = None,
    iterations: int | None = None,
    resolution: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> VideoRegions:
    """Linked instances of all semantics as the regions of a video; arguments as in `segment_video`."""
    instances = model.config.instances if instances is None else instances
    semantics = model.config.slots
    if semantics * instances > _LARGEST_PARTITION:
        raise UserError(
            f"instances: got {instances} of each of {semantics} semantics, expected at most "
            f"{_LARGEST_PARTITION // semantics}, for {_LARGEST_PARTITION} regions in all"
        )
    was_training = model.training
    model.eval()
    link, statistics, masks, previous = InstanceLinker(), StatisticsSum(), [], None
    try:
        short_side = min(model.frame_size) if resolution is None else resolution
        for features in encode_video(model.encoder, video, short_side=short_side, progress=progress):
            # A lone last frame has no neighbour of its own chunk to correspond to, but always a previous one.
            maps = model.segment(
                features, instances=instances, iterations=iterations, seed=seed, previous_keys=previous
            )
            previous = features.keys[:, -1]
            joint = maps.semantic[0, :, :, None] * maps.instance[0]
            index = torch.stack([link(slots) for slots in maps.instance_slots[0]])
            joint = torch.take_along_dim(joint, index[..., None], dim=2)
            joint = joint.flatten(1, 2).unflatten(-1, features.grid).float()
            keys = F.normalize(features.keys[0].float(), dim=-1)
            statistics.add(joint, keys)
            masks.append(joint.half().cpu())
    finally:
        model.train(was_training)
    collected = statistics.result()
    return VideoRegions(
        torch.cat(masks),
        type(collected)(*(part.cpu() for part in collected)),
        torch.arange(semantics).repeat_interleave(instances),
    )


def to_segmentation(
    regions: VideoRegions, video: Video, *, merge_foreground: bool = False
) -> VideoSegmentation:
    """Select tracks among the regions and draw both at the size of the video."""
    selection = select(regions.statistics, regions.semantics, merge_foreground=merge_foreground)
    table = torch.cat([torch.zeros(1, dtype=torch.uint8), selection.track.to(torch.uint8)])
    partition = torch.empty(len(regions.masks), *video.size, dtype=torch.uint8)
    for masks, drawn in zip(regions.masks, partition, strict=True):
        drawn.copy_(strongest_region(masks, video.size))
    return VideoSegmentation(
        name=video.name,
        tracks=table[partition.int()].numpy(),
        foreground=selection.foreground,
        partition=partition.numpy(),
        scores=selection.scores,
    )


def strongest_region(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (R, h, w) -> uint8 (height, width): the strongest region after bilinear upsampling, counted from 1."""
    masks = masks.float()
    flat = masks.flatten(1)
    # Only regions that come first or second somewhere can win between positions, near enough; few do.
    active = flat.topk(min(2, len(flat)), dim=0).indices.unique()
    winner = F.interpolate(masks[active][None], size, mode="bilinear", align_corners=False)[0].argmax(0)
    return (active[winner] + 1).to(torch.uint8)
