"""Pictures, videos and pages people look at: Pillow, numpy and PyAV only."""

from objslot.viz.overlay import colorize, contours, overlay
from objslot.viz.palette import davis_palette, overlay_colors, write_indexed_png
from objslot.viz.sheet import contact_sheet
from objslot.viz.video import VideoWriter

__all__ = [
    "VideoWriter",
    "colorize",
    "contact_sheet",
    "contours",
    "davis_palette",
    "overlay",
    "overlay_colors",
    "write_indexed_png",
]
