"""What every video is: a random-access sequence of RGB frames."""

import abc
import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from objslot.errors import UserError

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


def digest(files: list[Path]) -> str:
    """Changes whenever one of the files on disk does: of paths, sizes and modification times."""
    found = hashlib.sha256()
    for file in files:
        with readable(file):
            facts = file.stat()
        found.update(f"{file.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return found.hexdigest()
