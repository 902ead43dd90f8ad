"""Bars of ratios on a logarithmic axis, as SVG for a light and for a dark background."""

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

THEMES = {
    "light": {"text": "#1f2328", "grid": "#d1d9e0", "eager": "#8c959f", "compiled": "#0969da", "one": "#cf222e"},
    "dark": {"text": "#f0f6fc", "grid": "#3d444d", "eager": "#656c76", "compiled": "#4493f8", "one": "#f85149"},
}
LABELS, PLOT, ROW, BAR, TOP = 330, 420, 34, 12, 46
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def bars(rows: Sequence[tuple[str, float, float | None]], theme: str) -> str:
    """One row for each (label, times faster than eager, than compiled or None); the line is at 1."""
    colours = THEMES[theme]
    values = [value for _, *pair in rows for value in pair if value is not None] or [1.0]
    low, high = min(0.8, min(values) * 0.9), max(2.0, max(values) * 1.15)
    height = TOP + ROW * len(rows) + 26

    def place(value: float) -> float:
        return round(LABELS + PLOT * (math.log(value / low) / math.log(high / low)), 1)

    def text(x, y, words, anchor="start", size=12):
        return (
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colours["text"]}">'
            f"{escape(words)}</text>"
        )

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LABELS + PLOT + 60} {height}" '
        'font-family="system-ui, sans-serif">',
        text(LABELS, 16, "times faster than PyTorch, float32, forward and backward where there is one"),
    ]
    for x, kind, words in ((LABELS, "eager", "eager"), (LABELS + 80, "compiled", "fastest compiled")):
        lines.append(f'<rect x="{x}" y="26" width="10" height="10" fill="{colours[kind]}"/>')
        lines.append(text(x + 15, 35, words))
    for tick in TICKS:
        if low <= tick <= high:
            colour = colours["one"] if tick == 1 else colours["grid"]
            x = place(tick)
            lines.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{height - 20}" stroke="{colour}"/>')
            lines.append(text(x, height - 6, f"{tick:g}", "middle", 11))
    for number, (label, *pair) in enumerate(rows):
        y = TOP + ROW * number + 5
        lines.append(text(LABELS - 8, y + BAR + 3, label, "end"))
        for kind, value, top in zip(("eager", "compiled"), pair, (y, y + BAR), strict=True):
            if value is None:
                continue
            left, right = sorted((place(1.0), place(value)))
            width = round(max(right - left, 1), 1)
            lines.append(f'<rect x="{left}" y="{top}" width="{width}" height="{BAR - 1}" fill="{colours[kind]}"/>')
            lines.append(text(place(max(value, 1.0)) + 4, top + BAR - 2, f"{value:.3g}", size=10))
    return "\n".join([*lines, "</svg>", ""])
