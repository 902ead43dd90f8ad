"""Training clips: which video, which frames and which augmentation are a pure function of (seed, sample
number).

So a run can be resumed at any step, with any number of loader processes and of training processes, and sees
the same clips in the same order.
"""

import functools
import signal
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from objslot.data.augment import Photometric
from objslot.data.video import Video
from objslot.errors import UserError

# Streams of random numbers that must not meet.
_ORDER, _FRAMES, _STUDENT, _TEACHER = range(4)


class TooShort(UserError):
    """A video with fewer frames than a clip."""


class Source(Protocol):
    """Where the content of a clip comes from: pixels, or features stored beforehand."""

    augmentable: bool

    def read(self, video: Video, frames: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of those frames, each (T, ...); raises `UserError` for a video that cannot be read."""
        ...


class PixelSource:
    """Frames resized to ``size`` (height, width) without keeping the aspect: "frames", uint8 (T, 3, H, W)."""

    augmentable = True

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def read(self, video: Video, frames: Sequence[int]) -> dict[str, Tensor]:
        return {"frames": resize(video.read(frames), self.size)}


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (T, H, W, 3) -> uint8 (T, 3, *size), bilinear with antialiasing."""
    frames = frames.permute(0, 3, 1, 2)
    if tuple(frames.shape[-2:]) != tuple(size):
        frames = F.interpolate(frames, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return frames.contiguous()


def clip_positions(n_frames: int, frames: int, stride: int, random: np.random.Generator) -> list[int]:
    """``frames`` positions, ``stride`` apart or as far as the video allows, from a random start.

    Raises `TooShort` for fewer frames in the video than in a clip.
    """
    if n_frames < frames:
        raise TooShort(f"{n_frames} frame{'s' * (n_frames != 1)}, too short for clips of {frames}")
    stride = min(stride, (n_frames - 1) // (frames - 1)) if frames > 1 else 1
    start = int(random.integers(n_frames - stride * (frames - 1)))
    return [start + stride * i for i in range(frames)]


class ClipDataset(Dataset):
    """Clip number n of an endless, shuffled pass over ``videos``: every video once before any comes again.

    An entry of ``videos`` may be an error, for a video that has gone. Item n is a dict: the tensors of the
    source; "student" and "teacher", the augmentation drawn for either view (`augment.N_PARAMETERS`,), for a
    source of pixels; "failures", pairs of video index and `UserError` for videos met on the way that cannot
    be used, in whose place the next in order was taken. When none is left the item holds only its failures.
    """

    def __init__(
        self,
        videos: Sequence[Video | UserError],
        source: Source,
        *,
        frames: int = 4,
        stride: int = 4,
        seed: int = 0,
        photometric: Photometric | None = None,
    ):
        self.videos = list(videos)
        self.source = source
        self.frames = frames
        self.stride = stride
        self.seed = seed
        self.photometric = photometric or Photometric()
        self._failed: set[int] = set()

    def __getitem__(self, sample: int) -> dict[str, Any]:
        failures: list[tuple[int, UserError]] = []
        epoch, place = divmod(sample, len(self.videos))
        order = _order(self.seed, epoch, len(self.videos))
        for attempt in range(len(self.videos)):
            index = int(order[(place + attempt) % len(self.videos)])
            if index in self._failed:
                continue
            try:
                clip = self._read(index, np.random.default_rng([self.seed, _FRAMES, sample, attempt]))
            except UserError as error:
                self._failed.add(index)
                failures.append((index, error))
                continue
            if self.source.augmentable:
                for name, stream in (("student", _STUDENT), ("teacher", _TEACHER)):
                    clip[name] = self.photometric.draw(np.random.default_rng([self.seed, stream, sample]))
            return {**clip, "failures": failures}
        return {"failures": failures}

    def _read(self, index: int, random: np.random.Generator) -> dict[str, Any]:
        video = self.videos[index]
        if isinstance(video, UserError):
            raise video
        try:
            positions = clip_positions(video.n_frames, self.frames, self.stride, random)
        except TooShort as error:
            raise TooShort(f"{video.path}: {error}") from None
        return dict(self.source.read(video, positions))


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n_videos: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(n_videos)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the tensors of items along a new first dimension and join their failures.

    Where an item holds no clip, only the failures are left.
    """
    failures = [failure for item in items for failure in item["failures"]]
    if any(len(item) == 1 for item in items):
        return {"failures": failures}
    return {name: torch.stack([item[name] for item in items]) for name in items[0] if name != "failures"} | {
        "failures": failures
    }


def load_clips(
    dataset: ClipDataset, batches: Iterable[list[int]], *, workers: int, pin_memory: bool = False
) -> Generator[dict[str, Any], None, None]:
    """Batches of the given sample numbers, in order, read ahead by ``workers`` processes (0: in this one).

    Close the iterator to end the processes.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        prefetch_factor=2 if workers else None,
    )
    yield from loader


def _start_worker(worker: int) -> None:
    # Ctrl-C and a batch system's SIGTERM reach every process, but the training process decides what happens
    # then: it needs its loaders for the step that it finishes, and ends them itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
