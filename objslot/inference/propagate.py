"""Objects of the first frame carried through a video by the features of an encoder, without any training for it.

The label propagation of Contrastive Random Walk (Jabri et al. 2020), as the evaluations of self-supervised
backbones on DAVIS-2017 use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from objslot import propagate
from objslot.data import Video
from objslot.data.masks import VOID
from objslot.data.segmentation import MAX_TRACKS, VideoSegmentation
from objslot.errors import UserError
from objslot.inference.regions import CHUNK, Progress, normalise
from objslot.models.encoder import Encoder

# Entries of tokens that are made at a time: what an encoder holds meanwhile is a multiple of them.
_ENTRIES = 1 << 21


@dataclass(frozen=True)
class PropagationSettings:
    """How labels are carried on; the fields as `objslot.propagate` has them."""

    stride: int
    """Pixels of the frame that one position stands for, each way."""
    topk: int
    radius: int
    """In positions."""
    context: int = 20
    """Frames before the current one that take part, besides the first."""
    temperature: float = 0.2


SETTINGS = {
    16: PropagationSettings(stride=16, topk=7, radius=7),
    8: PropagationSettings(stride=8, topk=28, radius=35),
}
"""By stride."""


@torch.no_grad()
def propagate_masks(
    encoder: Encoder,
    video: Video,
    first: np.ndarray,
    settings: PropagationSettings,
    *,
    progress: Progress | None = None,
) -> VideoSegmentation:
    """The objects of the first frame in every frame.

    Args:
        encoder: gives the tokens that are compared.
        video: the frames, read once.
        first: uint8 (H, W), objects 1 to 20 of the first frame; 255 counts as background.
        settings: see `SETTINGS`.
        progress: called with (frames done, frames in all).

    Returns:
        Tracks numbered as the objects; the first frame's are `first`.

    Raises:
        UserError: a video that cannot be read or is smaller than a position, no object in `first`, one above 20, or
            another size than the video's.
    """
    first = np.where(first == VOID, 0, first).astype(np.uint8)
    n_objects = int(first.max(initial=0))
    if first.shape != video.size:
        raise UserError(f"{video.name}: first mask of shape {first.shape}, expected {video.size}, that of the frames")
    if not 1 <= n_objects <= MAX_TRACKS:
        raise UserError(f"{video.name}: first mask with object {n_objects}, expected objects from 1 to {MAX_TRACKS}")
    grid = _grid(video, settings.stride)
    memory, tracks = None, np.empty((video.n_frames, *video.size), np.uint8)
    for t, tokens in enumerate(_tokens(encoder, video, grid, settings.stride)):
        if memory is None:
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            memory = _Memory(tokens, _soft_labels(first, n_objects, grid).to(tokens.device, dtype), settings.context)
            tracks[0] = first
        else:
            labels = propagate(
                tokens,
                memory.keys,
                memory.labels,
                radius=settings.radius,
                topk=settings.topk,
                temperature=settings.temperature,
                n_global=1,
            )
            memory.add(tokens, labels)
            tracks[t] = _sharp_labels(labels, video.size)
        if progress is not None:
            progress(t + 1, video.n_frames)
    if memory is None:
        raise UserError(f"{video.name}: no frame could be read")
    return VideoSegmentation(video.name, tracks, tuple(range(1, n_objects + 1)))


class _Memory:
    """The first frame and the last ones: their tokens and labels, each place written over when its time is up."""

    def __init__(self, tokens: Tensor, labels: Tensor, context: int):
        self._keys = tokens.new_empty(1 + context, *tokens.shape)
        self._labels = labels.new_empty(1 + context, *labels.shape)
        self._keys[0], self._labels[0] = tokens, labels
        self._added = 0

    def add(self, tokens: Tensor, labels: Tensor) -> None:
        place = 1 + self._added % (len(self._keys) - 1)
        self._keys[place], self._labels[place] = tokens, labels
        self._added += 1

    @property
    def keys(self) -> Tensor:
        return self._keys[: 1 + self._added]

    @property
    def labels(self) -> Tensor:
        return self._labels[: 1 + self._added]


def _grid(video: Video, stride: int) -> tuple[int, int]:
    height, width = (round(side / stride) for side in video.size)
    if not height or not width:
        raise UserError(
            f"{video.name}: frames of {video.size[1]} x {video.size[0]} pixels, expected at least {stride} each way"
        )
    return height, width


def _tokens(encoder: Encoder, video: Video, grid: tuple[int, int], stride: int) -> Iterator[Tensor]:
    """Output tokens (h, w, D) of every frame on `grid`, of unit length, in half precision but where they are float64.

    The encoder sees the frame in as many patches as it has positions of 16 pixels, or of 8 where its patch is that
    small, and its tokens are interpolated to the grid where that is another.
    """
    own = 8 if encoder.patch_size <= 8 else 16
    coarse = tuple(max(1, round(side * stride / own)) for side in grid)
    size = tuple(side * encoder.patch_size for side in coarse)
    parameter = next(encoder.parameters())
    at_once = max(1, min(CHUNK, _ENTRIES // (grid[0] * grid[1] * encoder.width)))
    pending: list[Tensor] = []

    def flush() -> Iterator[Tensor]:
        features = encoder(torch.cat(pending)[None].to(parameter.dtype))
        pending.clear()
        tokens, own_grid = features.tokens[0].transpose(-1, -2).unflatten(-1, features.grid), features.grid
        del features
        if own_grid != grid:
            tokens = F.interpolate(tokens, grid, mode="bilinear", align_corners=False, antialias=True)
        # Of unit length, half precision is enough, and the frames that are remembered take half the memory.
        tokens.div_(tokens.norm(dim=1, keepdim=True).clamp_min(1e-12))
        if tokens.dtype != torch.float64:
            tokens = tokens.half()
        yield from tokens.permute(0, 2, 3, 1).contiguous()

    for frame in video.frames():
        pending.append(normalise(frame[None].to(parameter.device), size))
        if len(pending) == at_once:
            yield from flush()
    if pending:
        yield from flush()


def _soft_labels(mask: np.ndarray, n_objects: int, grid: tuple[int, int]) -> Tensor:
    """Index map (H, W) -> float (h, w, n_objects + 1): the share of each position that each object has."""
    one_hot = F.one_hot(torch.from_numpy(mask).long(), n_objects + 1).permute(2, 0, 1)[None].float()
    return F.interpolate(one_hot, grid, mode="area")[0].permute(1, 2, 0).contiguous()


def _sharp_labels(labels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Soft labels (h, w, C) -> index map uint8 of `size`, the strongest after bilinear upsampling."""
    upsampled = F.interpolate(labels.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)
    return upsampled[0].argmax(0).to(torch.uint8).cpu().numpy()
