"""A page for one video: complete in itself, no network, for a pointer, a finger or the keyboard."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from objslot.viz.palette import overlay_colors

MAX_FRAMES = 150
MAX_SIDE = 720

LAYER_TITLES = {
    "objects": "Objects",
    "truth": "Ground truth",
    "semantic": "Semantic map",
    "slots": "Instance map",
}


def jpeg_uri(picture: np.ndarray, max_side: int = MAX_SIDE, quality: int = 72) -> str:
    """A picture, uint8 (H, W, 3), as a JPEG data URI whose longer side is at most `max_side` pixels."""
    image = Image.fromarray(np.asarray(picture))
    image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return "data:image/jpeg;base64," + _base64(buffer.getvalue())


def run_lengths(index: np.ndarray) -> bytes:
    """Run-length code of an index map, row by row: the values of all runs, then their lengths.

    Args:
        index: uint8 (H, W), not empty.

    Returns:
        n bytes of values followed by n lengths, uint16 little endian; longer runs are split.
    """
    flat = np.asarray(index).ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=flat[0] ^ 1))
    lengths = np.diff(starts, append=flat.size)
    pieces = -(-lengths // 65535)
    values = np.repeat(flat[starts], pieces)
    split = np.full(values.size, 65535)
    split[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * 65535
    return values.tobytes() + split.astype("<u2").tobytes()


class VideoReport:
    """Gathers the frames of one video and writes its page.

    At most `MAX_FRAMES` frames, evenly spread, go into the page, at most `MAX_SIDE` pixels long, so that the
    page of a long video stays below some 15 megabytes.

    Args:
        name: the title of the page.
        n_frames: frames in the video.
        size: (H, W) in pixels.
        fps: frames per second.

    Attributes:
        shown: the numbers of the frames that go into the page.
    """

    def __init__(self, name: str, n_frames: int, size: tuple[int, int], fps: float):
        self.shown = frozenset(spread(n_frames, MAX_FRAMES))
        scale = min(1.0, MAX_SIDE / max(size))
        self._size = tuple(max(1, round(side * scale)) for side in size)
        self._areas: list[np.ndarray] = []
        self._page: dict = {
            "name": name,
            "height": self._size[0],
            "width": self._size[1],
            "fps": float(fps),
            "length": n_frames,
            "frames": [],
            "pictures": [],
            "layers": {},
            "attention": None,
        }

    def add(
        self, t: int, frame: np.ndarray, layers: Mapping[str, np.ndarray], attention: np.ndarray | None = None
    ):
        """Adds frame `t`; frames that the page leaves out cost nothing.

        Args:
            t: number of the frame; frames come in order.
            frame: uint8 (H, W, 3).
            layers: index maps uint8 of any size by name: `objects`, `truth`, `semantic`, `slots`; the same
                ones for every frame.
            attention: uint8 (I, N, h, w), of N slots after each of I iterations.
        """
        if t not in self.shown:
            return
        if attention is not None:
            self._add_attention(t, np.asarray(attention))
        self._page["frames"].append(t)
        self._page["pictures"].append(jpeg_uri(frame))
        for name, index in layers.items():
            index = self._bounded(np.asarray(index))
            layer = self._page["layers"].setdefault(
                name,
                {"title": LAYER_TITLES[name], "height": index.shape[0], "width": index.shape[1], "data": []},
            )
            layer["data"].append(_base64(run_lengths(index)))
            if name == "objects":
                self._areas.append(np.bincount(index.ravel(), minlength=256) / index.size)

    def _bounded(self, index: np.ndarray) -> np.ndarray:
        if max(index.shape) <= MAX_SIDE:
            return index
        return np.asarray(Image.fromarray(index).resize(self._size[::-1], Image.Resampling.NEAREST))

    def _add_attention(self, t: int, attention: np.ndarray) -> None:
        page = self._page
        if page["attention"] is None:
            iterations, slots, height, width = attention.shape
            page["attention"] = {
                "iterations": iterations,
                "slots": slots,
                "height": height,
                "width": width,
                "frames": [],
                "data": [],
            }
        page["attention"]["frames"].append(t)
        page["attention"]["data"].append(_base64(attention.tobytes()))

    def write(
        self,
        path: str | Path,
        objects: Sequence[Mapping] = (),
        *,
        facts: Sequence[str] = (),
        curves: Mapping[str, Sequence[float | None]] | None = None,
        marks: Mapping[str, int] | None = None,
    ) -> None:
        """Writes the page.

        Args:
            path: the file to write.
            objects: the tracks: dicts with `id`, `score` (or None) and `foreground`.
            facts: short lines under the title.
            curves: named values in 0 to 1 for every frame of the video, None where there is none.
            marks: named frames to jump to, such as the best and the worst.
        """
        page = dict(self._page)
        colors = overlay_colors()
        page["colors"] = colors.tolist()
        page["objects"] = [
            {
                "id": int(track["id"]),
                "score": track.get("score"),
                "foreground": bool(track.get("foreground")),
                "area": [round(float(area[track["id"]]), 4) for area in self._areas],
            }
            for track in objects
        ]
        page["facts"] = list(facts)
        shown, length = len(page["frames"]), page["length"]
        if shown < length:
            page["facts"].append(f"This page shows {shown} of the {length} frames, evenly spread.")
        page["curves"] = {
            name: [None if v is None else round(float(v), 4) for v in values]
            for name, values in (curves or {}).items()
        }
        page["marks"] = dict(marks or {})
        write_page(path, "video.html", page)


def write_page(path: str | Path, template: str, data: dict) -> None:
    """Writes a template of this package with `data` as the JSON that its script reads."""
    # "<" cannot end the script element from inside a string.
    code = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    Path(path).write_text(_page(template).replace("__DATA__", code), encoding="utf-8")


def _page(name: str) -> str:
    """A file of this package's pages, with the files that it names in their places."""
    text = resources.files("objslot.viz").joinpath("pages", name).read_text(encoding="utf-8")
    return re.sub(r"__FILE (\S+)__\n", lambda place: _page(place[1]), text)


def spread(n: int, most: int) -> list[int]:
    """At most `most` numbers from 0 to n - 1, evenly spread, ascending, both ends among them."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
