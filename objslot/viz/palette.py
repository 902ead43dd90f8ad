"""Colours: the DAVIS palette of indexed PNG files, and overlay colours for colour-blind people too."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

# Okabe and Ito's seven chromatic colours, then those of Tol's "muted" scheme that differ from them.
_BASE = (
    "E69F00 56B4E9 009E73 F0E442 0072B2 D55E00 CC79A7 332288 "
    "DDCC77 882255 44AA99 AA4499 117733 999933 CC6677 88CCEE"
)


@cache
def davis_palette() -> np.ndarray:
    """The palette of DAVIS and PASCAL VOC annotation files.

    Returns:
        uint8 (256, 3), read-only; index 0 is black. Bit k of an index sets bit 7 - k // 3 of channel k % 3.
    """
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        palette[:, bit % 3] |= ((index >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    palette.setflags(write=False)
    return palette


@cache
def overlay_colors() -> np.ndarray:
    """Colours of object identities, the same for an identity in every frame, picture and page.

    The first seven are Okabe and Ito's set, which stays distinct under the three kinds of dichromacy; the
    next nine come from Tol's muted scheme. Further identities repeat the sixteen, lighter and then darker.

    Returns:
        uint8 (256, 3), read-only; index 0 (no object) is black.
    """
    base = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in _BASE.split()], np.float64)
    lighter = base + 0.45 * (255 - base)
    darker = base * 0.6
    cycle = np.concatenate([base, lighter, darker])
    colors = np.concatenate([np.zeros((1, 3)), np.resize(cycle, (255, 3))]).round().astype(np.uint8)
    colors.setflags(write=False)
    return colors


def write_indexed_png(path: str | Path, index: np.ndarray) -> None:
    """Writes an index map as a palette PNG, the format of DAVIS annotations.

    Args:
        path: the file to write.
        index: uint8 (H, W).

    Raises:
        TypeError: `index` is not a uint8 array of two dimensions.
    """
    index = np.asarray(index)
    if index.dtype != np.uint8 or index.ndim != 2:
        raise TypeError(f"index must be uint8 of shape (H, W), got {index.dtype} of shape {index.shape}")
    image = Image.fromarray(np.ascontiguousarray(index))
    image.putpalette(davis_palette().tobytes())
    image.save(path, format="PNG", compress_level=3)
