"""Videos that are folders of images."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from objslot.data.video import FALLBACK_FPS, Video, digest, natural_key, readable
from objslot.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})


def is_image(path: Path) -> bool:
    """Whether ``path`` is a visible image file; a broken link is not."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


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
        return digest([self.path, *self.files])

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
