"""Mask images as files: indexed, grey and colour, read without losing the object numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from objslot.errors import UserError

MASK_SUFFIXES = frozenset({".png", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".gif"})
VOID = 255
"""Label of pixels that count neither for nor against a prediction."""


def mask_files(folder: Path) -> list[Path]:
    """Mask images of a folder in natural order of their names; hidden files are ignored."""
    from objslot.data.video import natural_key

    found = (p for p in folder.iterdir() if p.suffix.lower() in MASK_SUFFIXES and not p.name.startswith("."))
    return sorted(found, key=lambda path: natural_key(path.name))


def mask_size(path: Path) -> tuple[int, int]:
    """Height and width of a mask image, from its header alone."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not a readable mask image ({error})") from error


def read_mask(path: Path, *, colour: bool = False) -> tuple[np.ndarray, bool]:
    """Read one mask image.

    Args:
        path: an indexed, grey, black-and-white or RGB image.
        colour: give every colour its own number, red * 65536 + green * 256 + blue, instead of refusing
        colours.

    Returns:
        The values, (H, W), uint8 (int32 with ``colour``), and whether they are palette indices.

    Raises:
        UserError: an unreadable file, a colour image where indices or grey levels are expected, or values
        over 255.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            image: Image.Image = file
            palette = image.mode == "P"
            if image.mode in ("1", "LA", "PA", "RGBA", "CMYK", "YCbCr", "HSV"):
                image = image.convert({"1": "L", "LA": "L", "PA": "P"}.get(image.mode, "RGB"))
            if colour:
                red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=np.int32), -1, 0)
                return red << 16 | green << 8 | blue, False
            values = np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not a readable mask image ({error})") from error
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise UserError(f"{path}: a colour image; expected a mask of indices (palette) or grey levels")
        values = values[..., 0]
    if values.dtype != np.uint8:
        if values.min(initial=0) < 0 or values.max(initial=0) > 255:
            raise UserError(f"{path}: holds values up to {values.max()}; expected a mask of at most 8 bits")
        values = values.astype(np.uint8)
    return values, palette


def labels_of(maps: np.ndarray) -> tuple[int, ...]:
    """Labels other than 0 that occur in uint8 index maps (T, H, W), ascending."""
    seen = np.zeros(256, bool)
    for index_map in maps:
        seen |= np.bincount(index_map.ravel(), minlength=256) > 0
    return tuple(int(label) for label in np.flatnonzero(seen[1:]) + 1)
