"""Objects drawn over a frame: a translucent fill, a contour, and the identity as a number."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from objslot.viz.palette import overlay_colors


def _checked(frame: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    frame, index = np.asarray(frame), np.asarray(index)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise TypeError(f"frame must be uint8 of shape (H, W, 3), got {frame.dtype} of shape {frame.shape}")
    if index.dtype != np.uint8 or index.shape != frame.shape[:2]:
        raise ValueError(
            f"index must be uint8 of shape {frame.shape[:2]}, got {index.dtype} of shape {index.shape}"
        )
    return frame, index


def contours(index: np.ndarray, thickness: int = 1) -> np.ndarray:
    """Pixels of a region that lie within `thickness` steps of another region.

    Args:
        index: uint8 (H, W), 0 = no region.
        thickness: width of the contour in pixels, drawn inside the region.

    Returns:
        bool (H, W). The border of the picture is not a contour.
    """
    inner = np.ones(index.shape, bool)
    for axis in (0, 1):
        same = np.diff(index, axis=axis) == 0
        before, after = [slice(None)] * 2, [slice(None)] * 2
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        inner[tuple(before)] &= same
        inner[tuple(after)] &= same
    edge = ~inner
    for _ in range(thickness - 1):
        grown = edge.copy()
        grown[1:] |= edge[:-1] & (index[1:] == index[:-1])
        grown[:-1] |= edge[1:] & (index[1:] == index[:-1])
        grown[:, 1:] |= edge[:, :-1] & (index[:, 1:] == index[:, :-1])
        grown[:, :-1] |= edge[:, 1:] & (index[:, 1:] == index[:, :-1])
        edge = grown
    return edge & (index > 0)


def overlay(
    frame: np.ndarray,
    index: np.ndarray,
    *,
    alpha: float = 0.45,
    only: Collection[int] | None = None,
    labels: bool = True,
) -> np.ndarray:
    """Draws objects over a frame in the colours of `overlay_colors`.

    Args:
        frame: uint8 (H, W, 3), RGB.
        index: uint8 (H, W), 0 = no object.
        alpha: opacity of the fill, 0 to 1; contours are opaque.
        only: identities to draw; all of them if None.
        labels: write each identity's number inside its object.

    Returns:
        uint8 (H, W, 3), a new array.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.
    """
    frame, index = _checked(frame, index)
    if only is not None:
        keep = np.zeros(256, bool)
        keep[list(only)] = True
        index = np.where(keep[index], index, 0).astype(np.uint8)
    inside = np.flatnonzero(index)
    weight = np.uint16(round(256 * alpha))
    picture, flat = frame.copy(), index.ravel()[inside]
    pixels = picture.reshape(-1, 3)
    pixels[inside] = (pixels[inside] * (256 - weight) + (overlay_colors() * weight)[flat]) >> 8
    edge = contours(index, max(1, round(min(frame.shape[:2]) / 240)))
    picture[edge] = overlay_colors()[index[edge]]
    return _numbered(picture, index) if labels and inside.size else picture


def colorize(index: np.ndarray, labels: bool = False) -> np.ndarray:
    """An index map as a picture, uint8 (H, W) -> uint8 (H, W, 3), in the colours of `overlay_colors`."""
    picture = overlay_colors()[np.asarray(index)]
    return _numbered(picture, np.asarray(index)) if labels else picture


def _numbered(picture: np.ndarray, index: np.ndarray) -> np.ndarray:
    size = max(11, round(min(index.shape) / 15))
    # Every few pixels are enough to find the middle of an object.
    step = max(1, min(index.shape) // 120)
    coarse = index[::step, ::step]
    least = (1.2 * size / step) ** 2
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size)
    for identity in np.flatnonzero(np.bincount(coarse.ravel(), minlength=256)[1:] >= least) + 1:
        rows, columns = np.nonzero(coarse == identity)
        nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        draw.text(
            (step * columns[nearest], step * rows[nearest]),
            str(identity),
            font=font,
            anchor="mm",
            fill="white",
            stroke_width=max(1, size // 8),
            stroke_fill="black",
        )
    return np.asarray(image)
