"""Videos as random-access sequences of RGB frames: a folder of images or a file that PyAV can decode."""

import abc
import bisect
import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from objslot.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
VIDEO_SUFFIXES = frozenset(
    {
        ".mp4",
        ".m4v",
        ".mov",
        ".webm",
        ".mkv",
        ".avi",
        ".gif",
        ".mpg",
        ".mpeg",
        ".ts",
        ".wmv",
        ".flv",
        ".ogv",
        ".3gp",
    }
)
FALLBACK_FPS = 24.0


def natural_key(name: str) -> list:
    """Sort key under which ``frame2`` comes before ``frame10``."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.split(r"(\d+)", name)
    ]


class Video(abc.ABC):
    """A sequence of RGB frames of one size.

    Attributes: ``path``; ``name``, unique among the videos found together and safe as a folder name;
    ``n_frames``; ``size``, (height, width) in pixels; ``fps``, frames per second (a nominal value for a
    folder of images). Whatever is wrong with the files is raised as one `UserError`.
    """

    def __init__(self, path: str | Path, name: str | None = None):
        self.path = Path(path)
        self.name = name or self.path.stem

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @property
    @abc.abstractmethod
    def n_frames(self) -> int: ...

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int]: ...

    @property
    @abc.abstractmethod
    def fps(self) -> float: ...

    @abc.abstractmethod
    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Frames at the given positions, in the order given: uint8 (T, H, W, 3)."""

    @abc.abstractmethod
    def frames(self, start: int = 0) -> Iterator[torch.Tensor]:
        """Frames from ``start`` to the end, one at a time: uint8 (H, W, 3). Memory does not grow with the
        length.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """Raise `UserError` for what can be seen to be wrong without decoding every frame."""

    @abc.abstractmethod
    def identity(self) -> str:
        """A digest of path, sizes and modification times: it changes whenever the video on disk does."""

    def _positions(self, indices: Sequence[int]) -> list[int]:
        positions = [int(i) for i in indices]
        outside = [i for i in positions if not 0 <= i < self.n_frames]
        if outside:
            raise UserError(f"{self.path}: no frame {outside[0]}, expected 0 to {self.n_frames - 1}")
        return positions


class FrameFolder(Video):
    """A folder of images, one a frame, in natural order of their names. Hidden files and broken links are
    ignored.
    """

    fps = FALLBACK_FPS

    def __init__(self, path: str | Path, name: str | None = None):
        super().__init__(path, name or Path(path).name)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder of frames")
        self.files = sorted(
            (p for p in self.path.iterdir() if is_image(p)), key=lambda p: natural_key(p.name)
        )
        if not self.files:
            raise UserError(f"{self.path}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")

    @property
    def n_frames(self) -> int:
        return len(self.files)

    @cached_property
    def size(self) -> tuple[int, int]:
        return self._header(self.files[0])

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        positions = self._positions(indices)
        height, width = self.size
        out = torch.empty((len(positions), height, width, 3), dtype=torch.uint8)
        for slot, position in enumerate(positions):
            out[slot] = self._decode(self.files[position])
        return out

    def frames(self, start: int = 0) -> Iterator[torch.Tensor]:
        for file in self.files[start:]:
            yield self._decode(file)

    def check(self) -> None:
        for file in self.files:
            self._require_size(file, self._header(file))

    def identity(self) -> str:
        return _digest([self.path, *self.files])

    def _require_size(self, file: Path, size: tuple[int, int]) -> None:
        if size != self.size:
            raise UserError(
                f"{file}: {size[1]} x {size[0]} pixels, but {self.files[0].name} beside it has "
                f"{self.size[1]} x {self.size[0]}; the frames of a video must have one size"
            )

    def _header(self, file: Path) -> tuple[int, int]:
        from PIL import Image

        with readable(file), Image.open(file) as image:
            return image.height, image.width

    def _decode(self, file: Path) -> torch.Tensor:
        from PIL import Image

        with readable(file), Image.open(file) as image:
            self._require_size(file, (image.height, image.width))
            return torch.from_numpy(np.array(image.convert("RGB")))


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
        return _digest([self.path])

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


@contextlib.contextmanager
def readable(path: Path):
    """Turn what Pillow, PyAV and the file system raise for a bad file into one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: the file has disappeared") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read, damaged or of an unknown format ({reason})") from error


def is_image(path: Path) -> bool:
    """Whether ``path`` is a visible image file; a broken link is not."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def is_video(path: Path) -> bool:
    """Whether ``path`` is a visible file with the suffix of a video; a broken link is not."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with readable(file):
            facts = file.stat()
        digest.update(f"{file.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()
