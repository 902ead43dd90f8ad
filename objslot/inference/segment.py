"""Segmenting a video with a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from objslot.data import Video
from objslot.data.segmentation import MAX_TRACKS, FrameLabels, VideoSegmentation
from objslot.errors import UserError
from objslot.inference.figure import find_figure
from objslot.inference.objects import FoundObjects, draw_objects, find_objects
from objslot.inference.refine import refine
from objslot.inference.regions import (
    InstanceLinker,
    Progress,
    RegionSum,
    VideoRegions,
    encode_video,
)
from objslot.inference.selection import salient_regions, select, select_figure
from objslot.inference.spool import MaskSpool
from objslot.models import SMTC
from objslot.models.encoder import FrameFeatures

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
    features: Iterable[FrameFeatures] | None = None,
    spool_in: Path | None = None,
    progress: Progress | None = None,
) -> VideoRegions:
    """Linked instances of all semantics as the regions of a video; arguments as in `segment_video`.

    The `features` of the video, from `encode_video`, may be given. Masks that are too many for memory are kept in a
    temporary file in the folder `spool_in`.
    """
    instances = model.config.instances if instances is None else instances
    semantics = model.config.slots
    # A drawing may hold what is left of every semantics beside its instances.
    if semantics * (instances + 1) > _LARGEST_PARTITION:
        raise UserError(
            f"instances: got {instances} of each of {semantics} semantics, expected at most "
            f"{_LARGEST_PARTITION // semantics - 1}, for {_LARGEST_PARTITION} regions in all"
        )
    was_training = model.training
    model.eval()
    link, collected, previous = InstanceLinker(), RegionSum(spool_in), None
    try:
        short_side = min(model.frame_size) if resolution is None else resolution
        if features is None:
            features = encode_video(model.encoder, video, short_side=short_side, progress=progress)
        for chunk in features:
            # A lone last frame has no neighbour of its own chunk to correspond to, but always a previous one.
            maps = model.segment(
                chunk, instances=instances, iterations=iterations, seed=seed, previous_keys=previous
            )
            previous = chunk.keys[:, -1]
            joint = maps.semantic[0, :, :, None] * maps.instance[0]
            index = torch.stack([link(slots) for slots in maps.instance_slots[0]])
            joint = torch.take_along_dim(joint, index[..., None], dim=2)
            joint = joint.flatten(1, 2).unflatten(-1, chunk.grid).float()
            collected.add(joint, F.normalize(chunk.keys[0].float(), dim=-1))
    finally:
        model.train(was_training)
    return collected.result(torch.arange(semantics).repeat_interleave(instances))


@dataclass(frozen=True)
class RegionDrawing:
    """What a `VideoSegmentation` says of a video, each frame drawn when it is asked for."""

    name: str
    foreground: tuple[int, ...]
    scores: Mapping[int, float]
    size: tuple[int, int]
    _regions: VideoRegions
    _table: np.ndarray
    _objects: FoundObjects | None
    """The objects, where there may be several."""
    _figure: MaskSpool | None
    """Where there is one object, the evidence for it, see `find_figure`."""

    @property
    def n_frames(self) -> int:
        """Number of frames T."""
        return len(self._regions.masks)

    def frame(self, t: int, picture: Tensor) -> FrameLabels:
        """The index maps of frame t, which is `picture`, uint8 (H, W, 3), at the size of the video."""
        masks = self._regions.masks[t]
        partition = strongest_region(masks, self.size).numpy()
        if self._figure is not None:
            ground = refine(self._figure[t][0], picture).numpy() < 0
            left_over = len(masks) + 1 + self._regions.semantics.numpy().astype(np.uint8)
            tracks = self._table[np.where(ground, left_over[partition - 1], partition)]
            partition[ground] = len(masks) + 1
            return FrameLabels(tracks, partition)
        tracks, kinds = self._table[partition], self._objects.kinds
        drawn = draw_objects(
            self._objects.frame(t),
            kinds[masks.max(0).indices],
            kinds[torch.from_numpy(partition).long() - 1],
            lambda shares: strongest_region(shares, self.size),
        ).numpy()
        return FrameLabels(np.where(drawn > 0, drawn, tracks), partition)


def draw_regions(
    regions: VideoRegions, video: Video, *, merge_foreground: bool = False, spool_in: Path | None = None
) -> RegionDrawing:
    """Select tracks among the regions, to be drawn frame by frame at the size of the video.

    The foreground regions are cut into objects that keep their number (`find_objects`). With `merge_foreground` figure
    and ground are told apart position by position (`find_figure`) and parted where the picture has its edges
    (`refine`): the figure is track 1, and what remains of each semantics a track of its own. The partition then holds
    the instances inside the figure and, numbered after them, the ground as one.

    What is too large for memory is kept in a temporary file in the folder `spool_in`.
    """
    if merge_foreground:
        objects, figure = None, find_figure(regions, video, spool_in=spool_in)
        selection = select_figure(regions.statistics, regions.semantics)
    else:
        figure = None
        salient, foreground = salient_regions(regions.statistics)
        objects = find_objects(regions, salient, foreground, most=MAX_TRACKS, spool_in=spool_in)
        selection = select(regions.statistics, regions.semantics, objects.scores)
    table = np.concatenate([[0], selection.track.numpy()]).astype(np.uint8)
    return RegionDrawing(
        video.name, selection.foreground, selection.scores, video.size, regions, table, objects, figure
    )


def to_segmentation(
    regions: VideoRegions, video: Video, *, merge_foreground: bool = False
) -> VideoSegmentation:
    """Select tracks among the regions and draw both at the size of the video, all frames at once."""
    drawing = draw_regions(regions, video, merge_foreground=merge_foreground)
    tracks, partition = (np.empty((drawing.n_frames, *video.size), np.uint8) for _ in range(2))
    for t, picture in zip(range(drawing.n_frames), video.frames(), strict=True):
        tracks[t], partition[t] = drawing.frame(t, picture)
    return VideoSegmentation(drawing.name, tracks, drawing.foreground, partition, dict(drawing.scores))


def strongest_region(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (R, h, w) >= 0 -> uint8 (height, width): the strongest region after bilinear upsampling, counted from 1.

    Drawn in bands of rows, so that the memory does not grow with R times the size of the picture. Masks that agree
    in 15 binary digits count as equal, and the first of equal ones wins.
    """
    masks = masks.float()
    rows, height = masks.shape[-2], size[0]
    place = ((torch.arange(height) + 0.5) * rows / height - 0.5).clamp(0, rows - 1)
    upper = place.long()
    lower, share = (upper + 1).clamp(max=rows - 1), place - upper
    drawn = torch.empty(size, dtype=torch.uint8)
    for band in torch.arange(height).split(max(1, height // rows)):
        first, last = int(upper[band[0]]), int(lower[band[-1]])
        part = masks[:, first : last + 1]
        # Only regions that come first or second somewhere can win between positions, near enough; few do.
        active = part.flatten(1).topk(min(2, len(part)), dim=0).indices.unique()
        wide = F.interpolate(part[active].transpose(0, 1), size[1], mode="linear", align_corners=False)
        weight = torch.zeros(len(band), len(wide))
        weight.scatter_add_(1, (upper[band] - first)[:, None], 1 - share[band, None])
        weight.scatter_add_(1, (lower[band] - first)[:, None], share[band, None])
        full = (weight @ wide.flatten(1)).unflatten(1, wide.shape[1:])
        # With the number in the last digits of a value, a plain maximum is several times faster than an argmax.
        number = 255 - torch.arange(len(active), dtype=torch.int32)[:, None]
        marked = full.view(torch.int32).bitwise_and_(-256).bitwise_or_(number).view(torch.float32)
        winner = 255 - marked.amax(1).view(torch.int32).bitwise_and_(255)
        drawn[band[0] : band[-1] + 1] = active.to(torch.uint8)[winner] + 1
    return drawn
