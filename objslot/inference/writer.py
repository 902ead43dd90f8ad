"""The output folder of `discover`: masks, an overlay video, a contact sheet, a page, a JSON summary.

OUT/<name>/
    masks/00000.png     the tracks of a frame: palette PNG, 0 = no object
    slots/00000.png     every slot of a frame before selection (written when the segmentation holds it)
    overlay.mp4         the tracks over the video
    sheet.png           some frames side by side with their objects and their semantic map
    objects.json        tracks with scores, boxes and areas; the size and rate of the video; the settings
    report.html         a page to scrub through, complete in itself
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from objslot.data.segmentation import VideoSegmentation
from objslot.data.video import Video
from objslot.errors import UserError
from objslot.inference.display import DisplayMaps
from objslot.inference.segment import RegionDrawing
from objslot.viz import VideoWriter, contact_sheet, overlay, write_indexed_png
from objslot.viz.folders import fresh_folder, refuse_existing, safe_name
from objslot.viz.report import VideoReport, spread

_SHEET_ROWS = 6


def output_folders(out: str | Path, names: Iterable[str]) -> list[Path]:
    """The folder of each video under `out`, equal names told apart by a number.

    Args:
        out: the output folder; need not exist.
        names: the names of the videos.

    Raises:
        UserError: one of the folders exists and is not empty, or is a file. Nothing is written before that.
    """
    out, taken, folders = Path(out), set(), []
    for name in map(safe_name, names):
        unique, count = name, 1
        while unique.lower() in taken:
            count += 1
            unique = f"{name}-{count}"
        taken.add(unique.lower())
        folders.append(out / unique)
    for folder in folders:
        refuse_existing(folder)
    return folders


def write_segmentation(
    video: Video,
    segmentation: VideoSegmentation | RegionDrawing,
    folder: str | Path,
    *,
    maps: DisplayMaps | None = None,
    settings: dict | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Writes everything a person wants of one segmented video.

    Frames are decoded, drawn and written one at a time: memory does not grow with the length of the video, but for
    six numbers a track and frame, and what of `MAX_FRAMES` frames goes into the page.

    Args:
        video: the frames.
        segmentation: its tracks and perhaps its partition.
        folder: where to write. Everything is written beside it and renamed when complete, so that a folder
            of this name always holds a whole result.
        maps: what the page shows beside the tracks.
        settings: how the segmentation was made, kept in objects.json; JSON values.
        progress: called with (frames done, frames in all).

    Returns:
        What objects.json holds.

    Raises:
        UserError: `folder` exists and is not empty, or the video has other frames than were segmented.
    """
    with fresh_folder(Path(folder)) as partial:
        return _write(partial, video, segmentation, maps or DisplayMaps(), settings or {}, progress)


def _write(folder, video, segmentation, maps, settings, progress) -> dict:
    n_frames = segmentation.n_frames
    shown = set(spread(n_frames, _SHEET_ROWS))
    height, width = video.size
    report = VideoReport(segmentation.name, n_frames, (height, width), video.fps)
    rows, titles, stats = [], [], _Tracks()
    (folder / "masks").mkdir()
    # People look at the objects; the other proposals stay in masks/ and can be switched on in the page.
    drawn = segmentation.foreground or None
    done = 0
    with VideoWriter(folder / "overlay.mp4", video.fps) as writer:
        for t, frame in enumerate(video.frames()):
            if t == n_frames:
                raise UserError(f"{video.name} has more frames than the {n_frames} that were segmented")
            labels = segmentation.frame(t, frame) if isinstance(segmentation, RegionDrawing) else segmentation.frame(t)
            frame = np.asarray(frame)
            tracks = _fitted(labels.tracks, frame.shape[:2])
            layers = {"objects": tracks}
            write_indexed_png(folder / "masks" / f"{t:05d}.png", tracks)
            stats.add(t, tracks)
            if labels.partition is not None:
                (folder / "slots").mkdir(exist_ok=True)
                layers["slots"] = _fitted(labels.partition, frame.shape[:2])
                write_indexed_png(folder / "slots" / f"{t:05d}.png", layers["slots"])
            picture = overlay(frame, tracks, only=drawn)
            writer.write(picture)
            if maps.semantic is not None and (t in report.shown or t in shown):
                layers["semantic"] = maps.semantic(t)
            report.add(t, frame, layers, maps.attention.get(t))
            if t in shown:
                rows.append(_sheet_row(frame, picture, layers))
                titles.append(f"{t / video.fps:.1f} s")
            done = t + 1
            if progress is not None:
                progress(done, n_frames)
    if done != n_frames:
        raise UserError(f"{video.name} has {done} readable frames, but {n_frames} were segmented")
    objects = stats.summary(segmentation.scores, segmentation.foreground)
    third = ["semantic map"] if maps.semantic is not None else ["slots"] if "slots" in layers else []
    seen = {track["id"] for track in objects}
    foreground = [int(k) for k in segmentation.foreground if k in seen]
    subtitle = f"{width} x {height}, {n_frames} frames, {_counted(objects, foreground)}"
    contact_sheet(
        rows,
        columns=["image", "objects", *third],
        row_titles=titles,
        title=segmentation.name,
        subtitle=subtitle,
    ).save(folder / "sheet.png")
    summary = {
        "name": segmentation.name,
        "frames": n_frames,
        "width": width,
        "height": height,
        "fps": float(video.fps),
        "foreground": foreground,
        "objects": objects,
        "settings": settings,
    }
    (folder / "objects.json").write_text(json.dumps(summary) + "\n")
    report.write(folder / "report.html", objects, facts=[subtitle])
    return summary


def _counted(objects: list[dict], foreground: list[int]) -> str:
    """How many objects and tracks of the background there are, in words."""
    number, ground = len(foreground), len(objects) - len(foreground)
    return f"{number} object{'' if number == 1 else 's'}, {ground} background track{'' if ground == 1 else 's'}"


def _sheet_row(frame, picture, layers) -> list[np.ndarray]:
    third = layers.get("semantic", layers.get("slots"))
    if third is None:
        return [frame, picture]
    return [frame, picture, overlay(frame, _fitted(third, frame.shape[:2]), alpha=0.7, labels=False)]


def _fitted(index, shape: tuple[int, int]) -> np.ndarray:
    index = np.asarray(index)
    if index.shape == shape:
        return index
    return np.asarray(Image.fromarray(index).resize(shape[::-1], Image.Resampling.NEAREST))


class _Tracks:
    """Boxes and areas of the tracks, gathered frame by frame as plain numbers."""

    def __init__(self) -> None:
        self._seen: dict[int, array] = {}

    def add(self, t: int, tracks: np.ndarray) -> None:
        areas = np.bincount(tracks.ravel(), minlength=256)
        for identity, box in enumerate(ndimage.find_objects(tracks), start=1):
            if box is not None:
                seen = self._seen.setdefault(identity, array("l"))
                seen.extend((t, box[1].start, box[0].start, box[1].stop, box[0].stop, int(areas[identity])))

    def summary(self, scores: Mapping[int, float], foreground: tuple[int, ...]) -> list[dict]:
        """One dict a track: boxes are [left, top, right, bottom) in pixels, areas are in pixels."""
        summary = []
        for identity, numbers in sorted(self._seen.items()):
            seen = np.asarray(numbers).reshape(-1, 6)
            summary.append(
                {
                    "id": identity,
                    "score": float(scores[identity]) if identity in scores else None,
                    "foreground": identity in foreground,
                    "first_frame": int(seen[0, 0]),
                    "last_frame": int(seen[-1, 0]),
                    "frames": seen[:, 0].tolist(),
                    "boxes": seen[:, 1:5].tolist(),
                    "areas": seen[:, 5].tolist(),
                }
            )
        return summary
