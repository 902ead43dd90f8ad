"""Masks of any method, from folders of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from objslot.data.masks import labels_of, mask_files, read_mask
from objslot.data.segmentation import MAX_TRACKS, VideoSegmentation
from objslot.data.sequences import Sequence
from objslot.errors import UserError


def read_predictions(directory: str | Path, name: str, sequence: Sequence | None = None) -> VideoSegmentation:
    """Read the masks of one sequence, from ``directory/name/*`` or ``directory/name/masks/*``.

    Indexed images (a palette) and grey images with levels up to 20 hold track numbers; 0 is no object. Grey
    images with other levels are numbered in the order of the levels, so that black and white masks show track
    1. A file ``objects.json`` in ``directory/name`` may list the tracks called foreground, best first, under
    ``foreground``; without it every track is foreground, in the order of the numbers.

    Args:
        directory: the folder of predictions.
        name: the sequence's name.
        sequence: what the masks must fit. Masks are matched to the frames by their names without suffix (the
            judged frames suffice); if none is named like a frame, by their order, if there are as many as
            frames.

    Returns:
        The segmentation, without partition.

    Raises:
        UserError: a missing folder or mask, another size, more than 20 tracks, colour images, or an
            unreadable ``objects.json``. The message names the folder or file.
    """
    folder = Path(directory).expanduser() / name
    masks = folder / "masks" if (folder / "masks").is_dir() else folder
    files = mask_files(masks) if masks.is_dir() else []
    if not files:
        raise UserError(f"{folder}: no masks for the sequence {name}")
    by_position = dict(enumerate(files)) if sequence is None else _match(masks, files, sequence)
    n_frames = len(files) if sequence is None else sequence.n_frames

    tracks: np.ndarray | None = None
    palette = False
    for position, path in by_position.items():
        values, indexed = read_mask(path)
        size = (
            values.shape
            if sequence is None and tracks is None
            else sequence.size
            if sequence
            else tracks.shape[1:]
        )
        if values.shape != size:
            raise UserError(
                f"{path}: {values.shape[1]} x {values.shape[0]} pixels; "
                f"expected {size[1]} x {size[0]} as in {name}"
            )
        tracks = np.zeros((n_frames, *size), np.uint8) if tracks is None else tracks
        tracks[position] = values
        palette |= indexed
    tracks = _number(tracks, palette, masks)
    return VideoSegmentation(name=name, tracks=tracks, foreground=_foreground(folder, tracks))


def _match(folder: Path, files: list[Path], sequence: Sequence) -> dict[int, Path]:
    by_stem = {path.stem: path for path in files}
    names = sequence.frame_names
    if not by_stem.keys() & set(names):
        if len(files) == sequence.n_frames:
            return dict(enumerate(files))
        raise UserError(f"{folder}: {len(files)} masks for the {sequence.n_frames} frames of {sequence.name}")
    judged = sequence.annotated[1:-1] if sequence.first_frame_given else sequence.annotated
    missing = [names[i] for i in judged if names[i] not in by_stem]
    if missing:
        raise UserError(
            f"{folder}: no mask for frame {missing[0]} of {sequence.name} "
            f"({len(missing)} of {len(judged)} are missing)"
        )
    return {i: by_stem[frame] for i, frame in enumerate(names) if frame in by_stem}


def _number(tracks: np.ndarray, palette: bool, folder: Path) -> np.ndarray:
    levels = labels_of(tracks)
    highest = max(levels, default=0)
    if palette and highest > MAX_TRACKS:
        raise UserError(
            f"{folder}: holds the object number {highest}; "
            f"at most {MAX_TRACKS} proposals per video are allowed"
        )
    if len(levels) > MAX_TRACKS:
        raise UserError(
            f"{folder}: holds {len(levels)} grey levels; expected at most {MAX_TRACKS} proposals per video"
        )
    if highest <= MAX_TRACKS:
        return tracks
    number = np.zeros(256, np.uint8)
    number[list(levels)] = np.arange(1, len(levels) + 1)
    return number[tracks]


def _foreground(folder: Path, tracks: np.ndarray) -> tuple[int, ...]:
    path = folder / "objects.json"
    if not path.is_file():
        return labels_of(tracks)
    try:
        listed = json.loads(path.read_text()).get("foreground")
        return labels_of(tracks) if listed is None else tuple(int(track) for track in listed)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f'{path}: cannot be read ({error}); expected an object with a list "foreground"'
        ) from error
