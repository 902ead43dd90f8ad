"""Regions of a video: soft masks that keep their identity from frame to frame, before any selection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from objslot import assign
from objslot.data import MEAN, STD, Video
from objslot.errors import UserError
from objslot.inference.contrast import BorderContrast, border
from objslot.inference.spool import MaskSpool
from objslot.models.encoder import Encoder, FrameFeatures

CHUNK = 8
"""Frames that go through the encoder at once."""

Progress = Callable[[int, int], None]


class RegionStatistics(NamedTuple):
    """What a video says of each of its R regions, summed over frames."""

    mass: Tensor
    """(R,): share of all positions of the video."""
    feature: Tensor
    """(R, D): mean of the region's features of unit length."""
    border: Tensor
    """(R,): share of the region that lies on the border of the frame."""
    contrast: Tensor
    """(R,): mean of the region's contrast to the border, 0 for the typical position of the video, 1 for its most
    salient ones."""


class VideoRegions(NamedTuple):
    """Soft masks of R regions over T frames on an h x w grid, and what is known of the regions."""

    masks: Sequence[Tensor]
    """For each of T frames (R, h, w), half precision, summing to 1 over R."""
    statistics: RegionStatistics
    semantics: Tensor
    """(R,): the semantics that a region is an instance of."""
    contrast: Sequence[Tensor]
    """For each of T frames (1, h, w), half precision: contrast to the border, see `BorderContrast`."""
    contrast_range: tuple[float, float]
    """The contrast of the video's typical position and of its most salient ones."""
    features: Sequence[Tensor] = ()
    """For each of T frames (h * w, D), half precision, of unit length."""


class RegionSum:
    """Collects the regions of a video chunk by chunk: their masks, their contrast and what is known of them.

    Every figure is linear in the masks, so one pass over the video is enough; the contrast, which depends on the border
    of all frames, takes a second one over features that were put aside.

    Args:
        spool_in: where what is too large for memory is kept, see `MaskSpool`.
    """

    def __init__(self, spool_in: Path | None = None):
        self._masks, self._features, self._contrast = (MaskSpool(spool_in) for _ in range(3))
        self._measure = BorderContrast()
        self._mass = self._feature = self._border = None
        self._positions = 0

    def add(self, masks: Tensor, features: Tensor):
        """Add T frames: masks (T, R, h, w), features (T, h * w, D) of unit length."""
        self._measure.observe(features, tuple(masks.shape[-2:]))
        self._masks.append(masks)
        self._features.append(features)
        flat = masks.flatten(2).double()
        parts = {
            "_mass": flat.sum((0, 2)),
            "_feature": torch.einsum("trp,tpd->rd", flat, features.double()),
            "_border": flat.sum(0) @ border(masks.shape[-2:]).to(flat),
        }
        for name, value in parts.items():
            held = getattr(self, name)
            setattr(self, name, value if held is None else held + value)
        self._positions += flat.shape[0] * flat.shape[2]

    def result(self, semantics: Tensor) -> VideoRegions:
        """The regions of all frames added, instances of `semantics` (R,); to be asked for once."""
        mass = self._mass.clamp(min=1e-12)
        contrasts = torch.zeros_like(mass)
        for masks, features in zip(self._masks, self._features, strict=True):
            masks, features = masks.to(mass.device).float(), features.to(mass.device).float()
            contrast = self._measure(features, tuple(masks.shape[-2:]))
            self._contrast.append(contrast[None, None])
            contrasts += (masks * contrast).sum((1, 2)).double()
        low, high = self._measure.range()
        statistics = RegionStatistics(
            mass=self._mass / self._positions,
            feature=self._feature / mass[:, None],
            border=self._border / mass,
            contrast=(contrasts / mass - low) / (high - low),
        )
        statistics = RegionStatistics(*(part.float().cpu() for part in statistics))
        return VideoRegions(self._masks, statistics, semantics, self._contrast, (low, high), self._features)


def encode_video(
    encoder: Encoder, video: Video, *, short_side: int, progress: Progress | None = None
) -> Iterator[FrameFeatures]:
    """Features of a video in chunks of frames, each a clip of up to `CHUNK` frames, decoded as they are needed.

    Frames keep their shape: the shorter side becomes `short_side` pixels, both are cut to whole patches.
    Raises UserError when the video cannot be read, or `short_side` is under one patch.
    """
    size = frame_size(encoder, video.size, short_side)
    parameter = next(encoder.parameters())
    done, pending = 0, []

    def flush() -> FrameFeatures:
        frames = torch.cat(pending)
        pending.clear()
        return encoder(frames[None].to(parameter.dtype))

    for frame in video.frames():
        # One at a time: a chunk of large frames in floating point would take gigabytes.
        pending.append(normalise(frame[None].to(parameter.device), size))
        done += 1
        if len(pending) == CHUNK:
            yield flush()
            if progress is not None:
                progress(done, video.n_frames)
    if pending:
        yield flush()
        if progress is not None:
            progress(done, video.n_frames)
    if not done:
        raise UserError(f"{video.name}: no frame could be read")


def frame_size(encoder: Encoder, size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) in pixels of frames of `size` brought to `short_side`, in whole patches."""
    patch = encoder.patch_size
    if short_side < patch:
        raise UserError(f"resolution: got {short_side} pixels, expected at least one patch of {patch}")
    scale = short_side / min(size)
    height, width = (max(round(side * scale / patch), 1) * patch for side in size)
    return height, width


def normalise(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 frames (T, H, W, 3) -> float32 (T, 3, height, width) as the encoders expect them."""
    frames = frames.permute(0, 3, 1, 2).float() / 255
    frames = F.interpolate(frames, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(value, device=frames.device).view(3, 1, 1) for value in (MEAN, STD))
    return (frames - mean) / std


class InstanceLinker:
    """Gives instances of one semantics the same number in every frame.

    Each semantics is linked alone: instances are matched one to one to running prototypes of the tracks by the
    cosine of their slots, and a prototype follows its instances as a moving average.
    """

    def __init__(self, momentum: float = 0.9):
        self._momentum = momentum
        self._prototypes: Tensor | None = None

    def __call__(self, slots: Tensor) -> Tensor:
        """Slots (N, P, D) of a frame -> index (N, P): which instance of the frame belongs to each track."""
        slots = F.normalize(slots.float(), dim=-1)
        if self._prototypes is None:
            self._prototypes = slots
            return torch.arange(slots.shape[1], device=slots.device).expand(slots.shape[:2])
        index = assign(self._prototypes @ slots.transpose(-1, -2))
        linked = torch.take_along_dim(slots, index[..., None], dim=1)
        self._prototypes = F.normalize(torch.lerp(linked, self._prototypes, self._momentum), dim=-1)
        return index
