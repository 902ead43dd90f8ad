"""Annotated videos: frames and, for some or all of them, a map of the objects."""

from __future__ import annotations

import abc
from functools import cached_property
from pathlib import Path

import numpy as np

from objslot.data.masks import VOID, mask_size, read_mask
from objslot.data.video import Video
from objslot.errors import UserError


class Sequence(abc.ABC):
    """One annotated video.

    Attributes:
        name: the sequence's name, unique in its data set.
        video: the frames (None for annotations without frames).
        merge_objects: whether the data set's convention is to judge all objects as one foreground.
        first_frame_objects: whether only the objects of the first frame count (DAVIS-2017).
        first_frame_given: whether the task gives the annotation of the first frame (DAVIS-2017 semi-supervised);
            then neither the first nor the last frame is judged.
    """

    def __init__(
        self,
        name: str,
        video: Video | None,
        *,
        merge_objects: bool = False,
        first_frame_objects: bool = False,
        first_frame_given: bool = False,
    ):
        self.name = name
        self.video = video
        self.merge_objects = merge_objects
        self.first_frame_objects = first_frame_objects
        self.first_frame_given = first_frame_given

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.n_frames} frames)"

    @property
    @abc.abstractmethod
    def n_frames(self) -> int:
        """Number of frames of the video, annotated or not."""

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""

    @property
    @abc.abstractmethod
    def annotated(self) -> tuple[int, ...]:
        """Positions of the annotated frames, ascending."""

    @abc.abstractmethod
    def annotation(self, i: int) -> np.ndarray | None:
        """Annotation of frame ``i``: uint8 (H, W), 0 background, 255 void, else objects; or None."""

    @property
    def frame_names(self) -> tuple[str, ...]:
        """File names of the frames without suffix; numbers from 00000 where frames are not files."""
        files = getattr(self.video, "files", None)
        return tuple(f.stem for f in files) if files else tuple(f"{i:05d}" for i in range(self.n_frames))


class ArraySequence(Sequence):
    """Annotations that are already in memory.

    Args:
        name: the sequence's name.
        annotations: uint8 (T, H, W) index maps, 0 background, 255 void.
        video: the frames, where there are any.
    """

    def __init__(
        self, name: str, annotations: np.ndarray, video: Video | None = None, *, merge_objects: bool = False
    ):
        super().__init__(name, video, merge_objects=merge_objects)
        self._annotations = np.asarray(annotations)
        if self._annotations.dtype != np.uint8 or self._annotations.ndim != 3:
            raise UserError(
                f"{name}: annotations are {self._annotations.dtype} {self._annotations.shape}; "
                "expected uint8 (frames, height, width)"
            )

    @property
    def n_frames(self) -> int:
        return len(self._annotations)

    @property
    def size(self) -> tuple[int, int]:
        return self._annotations.shape[1], self._annotations.shape[2]

    @property
    def annotated(self) -> tuple[int, ...]:
        return tuple(range(self.n_frames))

    def annotation(self, i: int) -> np.ndarray:
        return self._annotations[i]


class MaskFileSequence(Sequence):
    """Frames in a folder, annotations in image files; opening it reads headers only.

    Where several files annotate one frame, each shows one object, white on black (SegTrack-v2).
    Where a sequence has no value but 0 and 255, 255 is its object (DAVIS-2016); otherwise 255 is void.
    With ``background`` every other colour is an object, numbered in the order of the colours (FBMS-59).

    Args:
        name: the sequence's name.
        video: the frames.
        masks: mask files by frame position, one tuple a frame.
        background: the colour, as 0xRRGGBB, of pixels without an object.
        conventions: ``merge_objects``, ``first_frame_objects``, ``first_frame_given`` of `Sequence`.

    Raises:
        UserError: a mask whose size differs from the frames', naming both.
    """

    def __init__(
        self,
        name: str,
        video: Video,
        masks: dict[int, tuple[Path, ...]],
        *,
        background: int | None = None,
        **conventions: bool,
    ):
        super().__init__(name, video, **conventions)
        self._masks = masks
        self._background = background
        for path in (path for paths in masks.values() for path in paths):
            height, width = mask_size(path)
            if (height, width) != video.size:
                raise UserError(
                    f"{path}: the mask has {width} x {height} pixels, the frames of {name} have "
                    f"{video.size[1]} x {video.size[0]}"
                )

    @property
    def n_frames(self) -> int:
        return self.video.n_frames

    @property
    def size(self) -> tuple[int, int]:
        return self.video.size

    @property
    def annotated(self) -> tuple[int, ...]:
        return tuple(sorted(self._masks))

    def annotation(self, i: int) -> np.ndarray | None:
        paths = self._masks.get(i)
        if paths is None:
            return None
        if self._background is not None:
            values, _ = read_mask(paths[0], colour=True)
            return np.searchsorted(self._colours, values, side="right").astype(np.uint8) * (
                values != self._background
            )
        if len(paths) > 1:
            labels = np.zeros(self.size, np.uint8)
            for number, path in enumerate(paths, start=1):
                labels[read_mask(path)[0] >= 128] = number
            return labels
        values, _ = read_mask(paths[0])
        return (values == VOID).astype(np.uint8) if self._white_is_object else values

    @cached_property
    def _white_is_object(self) -> bool:
        for i in self.annotated:
            values, palette = read_mask(self._masks[i][0])
            if ((values != 0) & (values != VOID)).any():
                return False
            # A grey file with white alone settles it; in a palette image 255 is void until every frame
            # agrees.
            if not palette and (values == VOID).any():
                return True
        return True

    @cached_property
    def _colours(self) -> np.ndarray:
        found = {
            int(code)
            for i in self.annotated
            for code in np.unique(read_mask(self._masks[i][0], colour=True)[0])
        }
        return np.array(sorted(found - {self._background}), dtype=np.int32)
