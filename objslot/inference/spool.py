"""Soft masks of a whole video, kept out of memory once they are many."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

IN_MEMORY = 1 << 26
"""Bytes up to which masks stay in memory."""


class MaskSpool:
    """Masks (R, h, w) of one frame after the other: in memory, then in a nameless temporary file.

    Args:
        directory: where the temporary file is made; the system's place for such files by default. It vanishes
            with this object, however the process ends.
        dtype: what the masks are kept in.
    """

    def __init__(self, directory: str | Path | None = None, dtype: torch.dtype = torch.float16):
        self._dtype = dtype
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=directory)
        self._shape: torch.Size | None = None
        self._length = 0

    def append(self, masks: Tensor) -> None:
        """Adds the masks (T, R, h, w) of T frames, all of one shape."""
        if self._shape is None:
            self._shape = masks.shape[1:]
        if masks.shape[1:] != self._shape:
            raise ValueError(f"masks: got {tuple(masks.shape[1:])} a frame, expected {tuple(self._shape)} as before")
        self._file.seek(0, 2)
        self._file.write(masks.to(self._dtype).cpu().contiguous().numpy().tobytes())
        self._length += len(masks)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, t: int) -> Tensor:
        if not 0 <= t < self._length:
            raise IndexError(f"no frame {t}, expected 0 to {self._length - 1}")
        record = bytearray(self._dtype.itemsize * math.prod(self._shape))
        self._file.seek(t * len(record))
        self._file.readinto(record)
        return torch.frombuffer(record, dtype=self._dtype).view(self._shape)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(self._length))
