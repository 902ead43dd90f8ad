"""The protocols: what of a segmentation is compared with what of the annotation.

* **A**, label-free: the tracks that the method itself calls foreground. One object (or merged objects): their
  union. Several: one assignment of these tracks to the objects for the whole video.
* **B**, official: the DAVIS-2017 unsupervised task. At most 20 non-overlapping proposals, one assignment for
  the whole video that maximises the mean over frames of (J + F) / 2, all frames, void pixels left out. A
  proposal is an empty mask where it is absent, and so is the one of an object that gets none.
* **C**, oracle: chooses with the annotation in every frame anew, from every region before any selection. One
  object: the union of the regions whose IoU with the object exceeds that with the background. Several: one
  assignment a frame, on (J + F) / 2, an empty mask being on offer too. An upper bound, not a result.
* **semi-supervised**: the DAVIS-2017 semi-supervised task. Track n is object n; first and last frame left
  out; void pixels count as background, as in the published evaluation.

FG-ARI and mBO judge the regions (before selection, where a segmentation has them) against the single objects,
merged or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from objslot.data.masks import VOID
from objslot.data.segmentation import VideoSegmentation
from objslot.data.sequences import Sequence
from objslot.errors import UserError
from objslot.evaluation.frames import Contents, SequenceFrames, assign
from objslot.evaluation.measures import foreground_ari, mean_best_overlap, statistics
from objslot.evaluation.workers import ITEMS_AT_ONCE, side_by_side

PROTOCOLS = ("A", "B", "C", "semi-supervised")
_FEW_PIXELS = 1 << 22


def evaluate_sequence(
    segmentation: VideoSegmentation,
    sequence: Sequence,
    protocols: Iterable[str] = ("A", "B", "C"),
    merge_objects: bool | None = None,
    *,
    workers: int = 1,
) -> dict:
    """Judge one segmentation.

    Args:
        segmentation: masks for every frame of the sequence, at its size.
        sequence: the annotations; frames without one are not judged.
        protocols: names from `PROTOCOLS`.
        merge_objects: judge all objects as one; default: the data set's convention.
        workers: processes that measure frames side by side.

    Returns:
        For every protocol ``J``, ``F``, ``JF``, ``J_recall``, ``J_decay``, ``F_recall`` and ``F_decay``,
        means over the objects, as fractions; ``objects``, the same for each with its annotation number
        ``object`` and its ``track`` (None for protocol C and for the union of A); ``curve``, J and F of every
        judged frame, with the positions ``frames``, ``best`` and ``worst``. Besides, ``regions``: ``FG-ARI``
        and ``mBO`` as means over the frames, ``FG-ARI_video`` and ``mBO_video`` over the video as one volume
        (None where undefined).

    Raises:
        UserError: an unknown protocol, another number or size of frames, an annotation without objects, or a
            track number above the number of objects under the semi-supervised protocol.
    """
    protocols = check_protocols(protocols)
    merge = sequence.merge_objects if merge_objects is None else merge_objects
    _check_shape(segmentation, sequence)
    positions = sequence.annotated
    frames = SequenceFrames(segmentation, sequence, merge, protocols)
    # What a sequence keeps of its annotations as a whole, it finds out here, once for all processes.
    sequence.annotation(positions[0])
    # Where a sequence takes milliseconds, so would starting processes.
    few = len(positions) * math.prod(sequence.size) <= _FEW_PIXELS
    workers = 1 if few else min(workers, math.ceil(len(positions) / ITEMS_AT_ONCE))
    with side_by_side(frames, workers) as run:
        contents = run("contents", positions)
        whole = Contents.of_all(contents)
        objects = _objects(sequence, contents[0].annotated if sequence.first_frame_objects else whole.annotated)
        if "semi-supervised" in protocols and whole.n_tracks > len(objects):
            raise UserError(
                f"{segmentation.name}: holds track {whole.n_tracks}, but the sequence has {len(objects)} objects"
            )
        measured = run("measure", positions, (objects, whole.n_tracks, whole.n_regions))

    results = {}
    for protocol in protocols:
        kept = slice(1, -1) if protocol == "semi-supervised" and len(positions) > 2 else slice(None)
        j, f, tracks = _select(protocol, measured, segmentation, merge)
        labels = (1,) if merge and protocol != "semi-supervised" else objects
        results[protocol] = _summary(j[kept], f[kept], labels, tracks, positions[kept])
    results["regions"] = _region_scores(np.stack([frame["regions"] for frame in measured]))
    return results


def check_protocols(protocols: Iterable[str]) -> tuple[str, ...]:
    """The protocols without repetition; `UserError` for an unknown one or none."""
    protocols = tuple(dict.fromkeys(protocols))
    unknown = [protocol for protocol in protocols if protocol not in PROTOCOLS]
    if unknown or not protocols:
        raise UserError(
            f"protocols: got {', '.join(protocols) or 'none'}, expected some of {', '.join(PROTOCOLS)}"
        )
    return protocols


def _check_shape(segmentation: VideoSegmentation, sequence: Sequence) -> None:
    if segmentation.n_frames != sequence.n_frames:
        raise UserError(
            f"{sequence.name}: masks for {segmentation.n_frames} frames, "
            f"but the sequence has {sequence.n_frames}"
        )
    if segmentation.size != sequence.size:
        (height, width), (expected_height, expected_width) = segmentation.size, sequence.size
        raise UserError(
            f"{sequence.name}: masks of {width} x {height} pixels, but its frames have "
            f"{expected_width} x {expected_height}"
        )


def _objects(sequence: Sequence, labels: Iterable[int]) -> tuple[int, ...]:
    """Annotation numbers of the objects that count, out of the labels that occur where they are looked for."""
    labels = sorted(set(labels) - {VOID})
    if not labels:
        where = "its first frame" if sequence.first_frame_objects else "any frame"
        raise UserError(f"{sequence.name}: the annotation shows no object in {where}")
    # The published evaluation counts every number up to the highest of the first frame.
    return tuple(range(1, labels[-1] + 1)) if sequence.first_frame_objects else tuple(labels)


def _select(
    protocol: str, measured: list[dict], segmentation: VideoSegmentation, merge: bool
) -> tuple[np.ndarray, np.ndarray, tuple[int | None, ...]]:
    """J and F over time, (T, G) each, and the track of every target."""
    if protocol == "C" or protocol == "semi-supervised" or (protocol == "A" and merge):
        j, f = np.stack([frame[protocol] for frame in measured], axis=1)
        own = protocol == "semi-supervised"
        return j, f, tuple(number + 1 if own else None for number in range(j.shape[1]))
    j, f = (np.stack([frame[name] for frame in measured]) for name in ("J", "F"))
    n_labels, n_targets = j.shape[1] - 1, j.shape[2]
    labels = range(1, n_labels + 1)
    if protocol == "A":
        labels = [track for track in segmentation.foreground if track <= n_labels]
    rows, tracks = assign((j.mean(0) + f.mean(0)) / 2, labels, max(0, n_targets - len(labels)))
    return j[:, rows, range(n_targets)], f[:, rows, range(n_targets)], tracks


def _summary(
    j: np.ndarray,
    f: np.ndarray,
    labels: tuple[int, ...],
    tracks: tuple[int | None, ...],
    positions: tuple[int, ...],
) -> dict:
    """Statistics of J and F, (T, G) each, in the form of `evaluate_sequence`."""
    objects = []
    for g, (label, track) in enumerate(zip(labels, tracks, strict=True)):
        (j_mean, j_recall, j_decay), (f_mean, f_recall, f_decay) = statistics(j[:, g]), statistics(f[:, g])
        objects.append(
            {
                "object": label,
                "track": track,
                "J": j_mean,
                "F": f_mean,
                "JF": (j_mean + f_mean) / 2,
                "J_recall": j_recall,
                "J_decay": j_decay,
                "F_recall": f_recall,
                "F_decay": f_decay,
            }
        )
    quality = (j + f).mean(1)
    return mean_scores(objects) | {
        "objects": objects,
        "curve": {
            "frames": [int(i) for i in positions],
            "J": j.mean(1).tolist(),
            "F": f.mean(1).tolist(),
            "best": int(positions[quality.argmax()]),
            "worst": int(positions[quality.argmin()]),
        },
    }


SCORES = ("J", "F", "JF", "J_recall", "J_decay", "F_recall", "F_decay")


def mean_scores(objects: list[dict]) -> dict:
    """Mean of every score over objects."""
    return {score: float(np.mean([entry[score] for entry in objects])) for score in SCORES}


def _region_scores(tables: np.ndarray) -> dict:
    """FG-ARI and mBO from the contingency tables (T, K + 1, G + 1) of a video."""
    whole = tables.sum(0)
    scores = {}
    for name, measure in (("FG-ARI", foreground_ari), ("mBO", mean_best_overlap)):
        frames = [value for value in map(measure, tables) if not np.isnan(value)]
        scores[name] = float(np.mean(frames)) if frames else None
        scores[name + "_video"] = float(measure(whole)) if frames else None
    return scores
