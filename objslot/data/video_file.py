"""Videos in files that PyAV can decode."""

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from objslot.data.video import FALLBACK_FPS, Video, digest, readable
from objslot.errors import UserError

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp")
)


def is_video(path: Path) -> bool:
    """Whether ``path`` is a visible file with the suffix of a video; a broken link is not."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".") and path.is_file()


@dataclass(frozen=True)
class _Index:
    """What one pass over the packets and one decoded frame tell about a video file, without decoding the
    rest.
    """

    n_frames: int
    times: list[int] | None  # presentation times in display order; None where they are missing or not unique
    keyframes: list[int]  # display positions that decoding can start from
    size: tuple[int, int]
    fps: float


class VideoFile(Video):
    """A video file, decoded on demand by PyAV; rotation metadata is applied, frames are counted rather than
    timed.

    The packets are indexed once (no decoding), so that ``read`` lands on the exact frame after a seek, with
    variable frame rates and reordered frames too. The object holds no open file and can be sent to another
    process.
    """

    def __init__(self, path: str | Path, name: str | None = None):
        super().__init__(path, name)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such video file")
        if self.path.stat().st_size == 0:
            raise UserError(f"{self.path}: the file is empty (0 bytes)")

    @cached_property
    def _index(self) -> _Index:
        with self._container() as container:
            fps = container.streams.video[0].average_rate or container.streams.video[0].guessed_rate
            packets = [packet for packet in container.demux(video=0) if packet.size and not packet.is_discard]
            truncated = any(packet.is_corrupt for packet in packets)
            times = [packet.pts for packet in packets]
            keys = [packet.pts for packet in packets if packet.is_keyframe]
        if truncated or not packets:
            raise UserError(f"{self.path}: the video is damaged or cut off after {len(packets)} frames")
        with self._container() as container:
            first = next(container.decode(video=0), None)
            if first is None:
                raise UserError(f"{self.path}: no frame could be decoded")
            size, start = _upright(first).shape[:2], first.pts
        indexed = None not in times and len(set(times)) == len(times) and start == min(times)
        times = sorted(times) if indexed else None
        keyframes = sorted(bisect.bisect_left(times, key) for key in keys) if indexed else [0]
        return _Index(len(packets), times, keyframes, size, float(fps or FALLBACK_FPS))

    @property
    def n_frames(self) -> int:
        return self._index.n_frames

    @property
    def size(self) -> tuple[int, int]:
        return self._index.size

    @property
    def fps(self) -> float:
        return self._index.fps

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        positions = self._positions(indices)
        height, width = self.size
        out = torch.empty((len(positions), height, width, 3), dtype=torch.uint8)
        decoder, frame, upcoming = None, None, 0
        for slot in sorted(range(len(positions)), key=positions.__getitem__):
            position = positions[slot]
            if decoder is not None and position == upcoming - 1:
                out[slot] = frame
                continue
            if decoder is None or self._keyframe_before(position) > upcoming:
                decoder, upcoming = self._decode(position), position
            while upcoming <= position:
                frame, upcoming = next(decoder), upcoming + 1
            out[slot] = frame
        return out

    def frames(self, start: int = 0) -> Iterator[torch.Tensor]:
        if start < self.n_frames:
            yield from self._decode(start)

    def check(self) -> None:
        self._index  # noqa: B018  indexing is the check

    def identity(self) -> str:
        return digest([self.path])

    def _keyframe_before(self, position: int) -> int:
        keyframes = self._index.keyframes
        return keyframes[max(0, bisect.bisect_right(keyframes, position) - 1)] if keyframes else 0

    def _decode(self, start: int) -> Iterator[torch.Tensor]:
        """Frames ``start`` to the end; starts earlier where a container seeks too far."""
        key = self._keyframe_before(start)
        while True:
            with self._container() as container:
                frames = self._numbered(container, key)
                position, frame = next(frames, (self.n_frames, None))
                if position > start and key > 0:
                    key = self._keyframe_before(key - 1)
                    continue
                expected = start
                while position < self.n_frames:
                    if position > expected:
                        break
                    if position == expected:
                        pixels = _upright(frame)
                        if pixels.shape[:2] != self.size:
                            raise UserError(f"{self.path}: the frame size changes at frame {position}")
                        yield torch.from_numpy(np.ascontiguousarray(pixels))
                        expected += 1
                    position, frame = next(frames, (self.n_frames, None))
                if expected < self.n_frames:
                    raise UserError(f"{self.path}: frame {expected} of {self.n_frames} could not be decoded")
                return

    def _numbered(self, container, key: int):
        times = self._index.times
        if times is None:
            yield from enumerate(container.decode(video=0))
            return
        if key > 0:
            container.seek(times[key], stream=container.streams.video[0])
        position_of = {time: position for position, time in enumerate(times)}
        for frame in container.decode(video=0):
            if frame.pts in position_of:
                yield position_of[frame.pts], frame

    @contextlib.contextmanager
    def _container(self):
        import av

        with readable(self.path), av.open(str(self.path)) as container:
            if not container.streams.video:
                raise UserError(f"{self.path}: the file holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = torch.get_num_threads()
            yield container


def _upright(frame) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of a PyAV frame, turned as its display matrix says."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90 % 4)
