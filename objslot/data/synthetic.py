"""Procedural videos of textured objects that move and hide one another, with exact masks.

Every layer of a video, the background among them, is printed with the same few colours, so colour says
little about which layer a pixel belongs to: what tells them apart is their texture, and that they move
together. Each object of a video has a pattern of its own (stripes, checks, dots, grain, weave); the
background is a drifting marble.

A video is a pure function of its seed. Random draws come from numpy's PCG64, whose stream is the same on
every machine; the pixels are float32 arithmetic on them, so another processor may round a colour by a level.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from objslot.data.annotated import ArraySequence
from objslot.data.scene import Scene
from objslot.data.textures import PATTERNS
from objslot.data.video import Video
from objslot.errors import UserError
from objslot.viz.palette import write_indexed_png
from objslot.viz.video import VideoWriter

__all__ = ["SyntheticVideo", "SyntheticVideos"]

# Part of a video's identity: raised whenever the same seed begins to give other pixels.
_VERSION = 1
_LEAST_SIDE = 16


class SyntheticVideo(Video):
    """One procedural video, with the mask of every object in every frame.

    Args:
        seed: what the video is drawn from; the same seed gives the same video. A whole number or several.
        n_frames: length in frames.
        size: frame height and width in pixels, or one number for square frames.
        n_objects: number of objects, 1 to 5. With two or more, one passes behind another.
        fps: frames per second, a nominal value until the video is written.
        name: the video's name; made from the seed when not given.

    Attributes, besides those of every video:
        n_objects: number of objects; the larger its number, from 1, the nearer an object is to the camera.
        patterns: the texture of every object, in order.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        seed: int | Iterable[int] = 0,
        n_frames: int = 16,
        size: int | tuple[int, int] = 192,
        n_objects: int = 3,
        fps: float = 8.0,
        name: str | None = None,
    ):
        key = (seed,) if isinstance(seed, int) else tuple(seed)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        if not key or min(key) < 0:
            raise UserError(f"seed: got {seed!r}, expected whole numbers of at least 0")
        if min(height, width) < _LEAST_SIDE:
            raise UserError(f"size: got {height} x {width} pixels, expected at least {_LEAST_SIDE} each way")
        if n_frames < 1:
            raise UserError(f"n_frames: got {n_frames}, expected at least 1")
        if not 1 <= n_objects <= len(PATTERNS):
            raise UserError(f"n_objects: got {n_objects}, expected 1 to {len(PATTERNS)}, a pattern for each")
        name = name or "synthetic-" + "-".join(str(part) for part in key)
        super().__init__(name, name)
        self._key, self._n_frames, self._size, self._fps = key, n_frames, (height, width), float(fps)
        self.n_objects = n_objects
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        self._scene = Scene(rng, n_frames, self.size, n_objects)
        self.patterns = self._scene.patterns
        self._render = lru_cache(maxsize=64)(self._scene.render)

    def __repr__(self) -> str:
        return f"SyntheticVideo({self.name}, {self.n_frames} frames of {self.size[0]} x {self.size[1]})"

    def __reduce__(self):
        # Frames are drawn again, rather than sent, where a process gets the video.
        return SyntheticVideo, (self._key, self.n_frames, self.size, self.n_objects, self.fps, self.name)

    @property
    def n_frames(self) -> int:
        return self._n_frames

    @property
    def size(self) -> tuple[int, int]:
        return self._size

    @property
    def fps(self) -> float:
        return self._fps

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        frames = [self._render(i)[0] for i in self._positions(indices)]
        return torch.from_numpy(np.stack(frames) if frames else np.zeros((0, *self.size, 3), np.uint8))

    def frames(self, start: int = 0) -> Iterator[torch.Tensor]:
        for index in range(start, self.n_frames):
            yield torch.from_numpy(self._render(index)[0].copy())

    def check(self) -> None:
        """Nothing can be wrong with it."""

    def identity(self) -> str:
        facts = (_VERSION, self._key, self.n_frames, self.size, self.n_objects)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def annotation(self, index: int) -> np.ndarray:
        """The visible part of every object in frame `index`: uint8 (H, W), 0 background, 1 to n_objects."""
        return self._render(self._positions([index])[0])[1].copy()

    @property
    def sequence(self) -> ArraySequence:
        """The video as an annotated sequence, objects judged one by one."""
        annotations = np.stack([self.annotation(i) for i in range(self.n_frames)])
        return ArraySequence(self.name, annotations, self)

    def write_frames(self, directory: str | Path) -> Path:
        """Write 00000.png and so on; returns the folder. Raises `UserError` if it has files in it."""
        directory = _empty_folder(directory)
        for index, frame in enumerate(self.frames()):
            Image.fromarray(frame.numpy()).save(directory / f"{index:05d}.png")
        return directory

    def write_masks(self, directory: str | Path) -> Path:
        """Write the masks as indexed 00000.png and so on; returns the folder. Raises as `write_frames`."""
        directory = _empty_folder(directory)
        for index in range(self.n_frames):
            write_indexed_png(directory / f"{index:05d}.png", self.annotation(index))
        return directory

    def write_mp4(self, path: str | Path) -> Path:
        """Write the frames as an H.264 file; returns its path. Raises `UserError` if it exists."""
        path = Path(path)
        if path.exists():
            raise UserError(f"{path}: exists already, expected the name of a new file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with VideoWriter(path, self.fps, quality=16) as writer:
            for frame in self.frames():
                writer.write(frame.numpy())
        return path


class SyntheticVideos(Sequence[SyntheticVideo]):
    """Procedural videos; video i of a seed is the same whatever their number, and no two seeds share one.

    Args:
        seed: of them all.
        n_videos: how many, at least 1.
        n_frames, size, n_objects, fps: as for `SyntheticVideo`.
    """

    def __init__(
        self,
        seed: int = 0,
        n_videos: int = 8,
        n_frames: int = 16,
        size: int | tuple[int, int] = 192,
        n_objects: int = 3,
        fps: float = 8.0,
    ):
        if n_videos < 1:
            raise UserError(f"n_videos: got {n_videos}, expected at least 1")
        self._videos = [
            SyntheticVideo((seed, index), n_frames, size, n_objects, fps) for index in range(n_videos)
        ]

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index):
        return self._videos[index]

    def write(self, root: str | Path) -> Path:
        """Write all videos in the layout of DAVIS-2017; returns ROOT.

        ROOT/JPEGImages/480p/<name>/00000.png (lossless, whatever the folder's name), the masks in
        ROOT/Annotations/480p/<name>/00000.png, the names in ROOT/ImageSets/2017/val.txt.

        Raises:
            UserError: ROOT has files in it.
        """
        root = _empty_folder(root)
        for video in self:
            video.write_frames(root / "JPEGImages" / "480p" / video.name)
            video.write_masks(root / "Annotations" / "480p" / video.name)
        names = root / "ImageSets" / "2017" / "val.txt"
        names.parent.mkdir(parents=True)
        names.write_text("".join(f"{video.name}\n" for video in self))
        return root


def _empty_folder(directory: str | Path) -> Path:
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: holds something already, expected a new or empty folder")
    directory.mkdir(parents=True, exist_ok=True)
    return directory
