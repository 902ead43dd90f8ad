"""A contact sheet: pictures in a grid with titles, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_INK, _QUIET, _PAPER = (28, 28, 30), (96, 96, 102), (255, 255, 255)


def _fitted(text: str, font: ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    columns: Sequence[str],
    row_titles: Sequence[str],
    title: str,
    subtitle: str = "",
    cell_width: int = 320,
) -> Image.Image:
    """Lays pictures out in a grid under column titles, with a title for each row at its left.

    Args:
        rows: for each row one uint8 (H, W, 3) picture for each column; any sizes, each fitted into its cell.
            The cell has the shape of the first picture.
        columns: a title for each column.
        row_titles: a title for each row.
        title, subtitle: the two lines at the top.
        cell_width: width of a cell in pixels.

    Returns:
        an RGB image.

    Raises:
        ValueError: there is no row, or the number of pictures and of titles disagree.
    """
    if not rows:
        raise ValueError("rows must hold at least one row of pictures")
    if len(row_titles) != len(rows) or any(len(row) != len(columns) for row in rows):
        raise ValueError(
            f"pictures and titles must match: {len(rows)} rows for {len(row_titles)} row titles, rows of "
            f"{sorted({len(row) for row in rows})} pictures for {len(columns)} column titles"
        )
    height, width = rows[0][0].shape[:2]
    cell_height = max(1, round(cell_width * height / width))
    large, medium, small = (ImageFont.load_default(size) for size in (24, 18, 15))
    margin, gap, head = 20, 8, 66 if subtitle else 42
    left = margin + max(round(small.getlength(text)) for text in row_titles) + 10
    top = margin + head + 28
    sheet = Image.new(
        "RGB",
        (
            left + len(columns) * (cell_width + gap) - gap + margin,
            top + len(rows) * (cell_height + gap) - gap + margin,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    room = sheet.width - 2 * margin
    draw.text((margin, margin), _fitted(title, large, room), font=large, fill=_INK)
    draw.text((margin, margin + 34), _fitted(subtitle, small, room), font=small, fill=_QUIET)
    for k, text in enumerate(columns):
        center = left + k * (cell_width + gap) + cell_width / 2
        draw.text((center, top - 8), _fitted(text, medium, cell_width), font=medium, fill=_INK, anchor="ms")
    for r, (row, text) in enumerate(zip(rows, row_titles, strict=True)):
        y = top + r * (cell_height + gap)
        draw.text((left - 10, y + cell_height / 2), text, font=small, fill=_QUIET, anchor="rm")
        for k, picture in enumerate(row):
            image = Image.fromarray(np.asarray(picture))
            scale = min(cell_width / image.width, cell_height / image.height)
            size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            image = image.resize(size, Image.Resampling.LANCZOS)
            x = left + k * (cell_width + gap)
            sheet.paste(image, (x + (cell_width - size[0]) // 2, y + (cell_height - size[1]) // 2))
    return sheet
