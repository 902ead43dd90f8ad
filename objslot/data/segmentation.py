"""What a segmenter says about one video: all that the evaluation, the writers and the viewers need to
know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from objslot.data.masks import labels_of
from objslot.errors import UserError

MAX_TRACKS = 20
"""Largest number of object proposals per video (the limit of the DAVIS-2017 unsupervised task)."""


class FrameLabels(NamedTuple):
    """The index maps of one frame, uint8 (H, W), as in `VideoSegmentation`."""

    tracks: np.ndarray
    partition: np.ndarray | None


@dataclass
class VideoSegmentation:
    """Object masks of one video, non-overlapping by construction.

    Arrays are numpy arrays; CPU torch tensors are accepted and converted without a copy.

    Attributes:
        name: the video's name.
        tracks: uint8 (T, H, W). 0 is no object; 1 to 20 are objects, the same number meaning the same object
            in every frame.
        foreground: track numbers that the method itself, without labels, calls foreground, best first. Used
            by protocol A.
        partition: uint8 (T, H, W) or None. Every region before any selection, 1 to 255 (0 is no region); used
            by protocol C, which falls back to ``tracks`` when it is None.
        scores: a label-free score per track number, higher is more object-like.

    Raises:
        UserError: a wrong dtype or shape, more than 20 tracks, a foreground number that is repeated or
            outside 1 to 20, or a partition of another shape. Each message names the video and the field.
    """

    name: str
    tracks: np.ndarray
    foreground: tuple[int, ...] = ()
    partition: np.ndarray | None = None
    scores: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tracks = self._index_map("tracks", self.tracks)
        highest = int(self.tracks.max(initial=0))
        if highest > MAX_TRACKS:
            raise UserError(
                f"{self.name}: tracks holds the number {highest}; "
                f"at most {MAX_TRACKS} proposals per video are allowed"
            )
        self.foreground = tuple(int(track) for track in self.foreground)
        wrong = [track for track in self.foreground if not 1 <= track <= MAX_TRACKS]
        if wrong or len(set(self.foreground)) != len(self.foreground):
            raise UserError(
                f"{self.name}: foreground is {self.foreground}; "
                f"expected different track numbers from 1 to {MAX_TRACKS}"
            )
        if self.partition is not None:
            self.partition = self._index_map("partition", self.partition)
            if self.partition.shape != self.tracks.shape:
                raise UserError(
                    f"{self.name}: partition has shape {self.partition.shape}, "
                    f"tracks has {self.tracks.shape}; expected the same"
                )

    def _index_map(self, field_name: str, value: object) -> np.ndarray:
        array = np.asarray(value)
        if array.dtype != np.uint8 or array.ndim != 3:
            raise UserError(
                f"{self.name}: {field_name} is {array.dtype} {array.shape}; "
                "expected uint8 (frames, height, width)"
            )
        return array

    def frame(self, t: int) -> FrameLabels:
        """The index maps of frame t."""
        return FrameLabels(self.tracks[t], None if self.partition is None else self.partition[t])

    @property
    def n_frames(self) -> int:
        """Number of frames T."""
        return self.tracks.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.tracks.shape[1], self.tracks.shape[2]

    @property
    def track_ids(self) -> tuple[int, ...]:
        """Track numbers that own at least one pixel somewhere in the video, ascending."""
        return labels_of(self.tracks)
