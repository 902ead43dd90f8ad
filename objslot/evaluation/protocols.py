"""The protocols: what of a segmentation is compared with what of the annotation.

* **A**, label-free: the tracks that the method itself calls foreground. One object (or merged objects): their union.
  Several: one assignment of these tracks to the objects for the whole video.
* **B**, official: the DAVIS-2017 unsupervised task. At most 20 non-overlapping proposals, one assignment for the whole
  video that maximises the mean over frames of (J + F) / 2, all frames, void pixels left out. A proposal is an empty
  mask where it is absent, and so is the one of an object that gets none.
* **C**, oracle: chooses with the annotation in every frame anew, from every region before any selection. One object:
  the union of the regions whose IoU with the object exceeds that with the background. Several: one assignment a frame,
  on (J + F) / 2, an empty mask being on offer too. An upper bound, not a result.
* **semi-supervised**: the DAVIS-2017 semi-supervised task. Track n is object n; first and last frame left out; void
  pixels count as background, as in the published evaluation.

FG-ARI and mBO judge the regions (before selection, where a segmentation has them) against the single objects, merged
or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import linear_sum_assignment

from objslot.data.masks import VOID, labels_of
from objslot.data.segmentation import VideoSegmentation
from objslot.data.sequences import Sequence
from objslot.errors import UserError
from objslot.evaluation.measures import (
    Outlines,
    boundary_f_matrix,
    contingency,
    foreground_ari,
    jaccard_matrix,
    mean_best_overlap,
    statistics,
)
from objslot.evaluation.packed import pack

PROTOCOLS = ("A", "B", "C", "semi-supervised")
FRAMES_PER_JOB = 8


def evaluate_sequence(
    segmentation: VideoSegmentation,
    sequence: Sequence,
    protocols: Iterable[str] = ("A", "B", "C"),
    merge_objects: bool | None = None,
    *,
    executor: Executor | None = None,
) -> dict:
    """Judge one segmentation.

    Args:
        segmentation: masks for every frame of the sequence, at its size.
        sequence: the annotations; frames without one are not judged.
        protocols: names from `PROTOCOLS`.
        merge_objects: judge all objects as one; default: the data set's convention.
        executor: runs the frames' measures; default: this thread.

    Returns:
        For every protocol ``J``, ``F``, ``JF``, ``J_recall``, ``J_decay``, ``F_recall`` and ``F_decay``, means over
        the objects, as fractions; ``objects``, the same for each with its annotation number ``object`` and its
        ``track`` (None for protocol C and for the union of A); ``curve``, J and F of every judged frame, with the
        positions ``frames``, ``best`` and ``worst``. Besides, ``regions``: ``FG-ARI`` and ``mBO`` as means over the
        frames, ``FG-ARI_video`` and ``mBO_video`` over the video as one volume (None where undefined).

    Raises:
        UserError: an unknown protocol, another number or size of frames, an annotation without objects, or a track
            number above the number of objects under the semi-supervised protocol.
    """
    protocols = check_protocols(protocols)
    merge = sequence.merge_objects if merge_objects is None else merge_objects
    _check_shape(segmentation, sequence)
    positions = sequence.annotated
    annotations = np.stack([sequence.annotation(i) for i in positions])
    objects = _objects(sequence, annotations)
    measured = _measure_all(segmentation, positions, annotations, objects, merge, protocols, executor)

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
        raise UserError(f"protocols is {', '.join(protocols) or 'empty'}; expected some of {', '.join(PROTOCOLS)}")
    return protocols


def _check_shape(segmentation: VideoSegmentation, sequence: Sequence) -> None:
    if segmentation.n_frames != sequence.n_frames:
        raise UserError(
            f"{sequence.name}: masks for {segmentation.n_frames} frames, but the sequence has {sequence.n_frames}"
        )
    if segmentation.size != sequence.size:
        (height, width), (expected_height, expected_width) = segmentation.size, sequence.size
        raise UserError(
            f"{sequence.name}: masks of {width} x {height} pixels, but its frames have "
            f"{expected_width} x {expected_height}"
        )


def _objects(sequence: Sequence, annotations: np.ndarray) -> tuple[int, ...]:
    """Annotation numbers of the objects that count."""
    judged = annotations[:1] if sequence.first_frame_objects else annotations
    labels = [label for label in labels_of(judged) if label != VOID]
    if not labels:
        where = "its first frame" if sequence.first_frame_objects else "any frame"
        raise UserError(f"{sequence.name}: the annotation shows no object in {where}")
    # The published evaluation counts every number up to the highest of the first frame.
    return tuple(range(1, max(labels) + 1)) if sequence.first_frame_objects else tuple(labels)


@dataclass
class _Job:
    """Some frames and what has to be measured in them; everything that a worker needs."""

    tracks: np.ndarray  # uint8 (n, H, W)
    regions: np.ndarray | None  # uint8 (n, H, W); None: the tracks are the regions
    annotations: np.ndarray  # uint8 (n, H, W)
    objects: tuple[int, ...]
    foreground: tuple[int, ...]
    n_tracks: int
    n_regions: int
    merge: bool
    protocols: tuple[str, ...]


def _measure_all(
    segmentation: VideoSegmentation,
    positions: tuple[int, ...],
    annotations: np.ndarray,
    objects: tuple[int, ...],
    merge: bool,
    protocols: tuple[str, ...],
    executor: Executor | None,
) -> list[dict]:
    n_tracks = int(segmentation.tracks.max(initial=0))
    if "semi-supervised" in protocols and n_tracks > len(objects):
        raise UserError(f"{segmentation.name}: holds track {n_tracks}, but the sequence has {len(objects)} objects")
    partition = segmentation.partition
    n_regions = n_tracks if partition is None else int(partition.max(initial=0))

    def jobs():
        for start in range(0, len(positions), FRAMES_PER_JOB):
            chosen = list(positions[start : start + FRAMES_PER_JOB])
            yield _Job(
                segmentation.tracks[chosen],
                None if partition is None else partition[chosen],
                annotations[start : start + FRAMES_PER_JOB],
                objects,
                segmentation.foreground,
                n_tracks,
                n_regions,
                merge,
                protocols,
            )

    run: Callable = map if executor is None else executor.map
    return [frame for frames in run(_measure_frames, jobs()) for frame in frames]


def _measure_frames(job: _Job) -> list[dict]:
    partition = [None] * len(job.tracks) if job.regions is None else job.regions
    return [_measure_frame(job, *maps) for maps in zip(job.tracks, partition, job.annotations, strict=True)]


def _measure_frame(job: _Job, tracks: np.ndarray, partition: np.ndarray | None, annotation: np.ndarray) -> dict:
    """Measures of one frame.

    ``regions``: contingency table of the regions and the single objects. ``J`` and ``F``, (K + 1, G): of every track,
    and of an empty mask in the last row, against every target. ``A``, ``C``, ``semi-supervised``: J and F of every
    target, (2, G), where they can be had frame by frame.
    """
    truth = _Truth(annotation, job.objects, job.merge)
    judged = _Labels(tracks, job.n_tracks, truth)
    regions = judged if partition is None else _Labels(partition, job.n_regions, truth)
    found = {"regions": regions.table[:-1]}
    if "B" in job.protocols or ("A" in job.protocols and not job.merge):
        found["J"], found["F"] = judged.scores
    if "A" in job.protocols and job.merge:
        found["A"] = judged.scores_of_union(job.foreground)
    if "C" in job.protocols and job.merge:
        found["C"] = regions.scores_of_union(_more_object_than_background(regions.merged_table))
    elif "C" in job.protocols:
        j, f = regions.scores
        rows, _ = _assign((j + f) / 2, range(1, job.n_regions + 1), len(job.objects))
        found["C"] = np.stack([j[rows, range(len(rows))], f[rows, range(len(rows))]])
    if "semi-supervised" in job.protocols:
        whole = _Truth(annotation, job.objects, merge=False, exclude_void=False)
        j, f = _Labels(tracks, len(job.objects), whole).scores
        found["semi-supervised"] = np.stack([j[:-1].diagonal(), f[:-1].diagonal()])
    return found


class _Truth:
    """The targets of one frame: every object, or all of them merged into one."""

    def __init__(self, annotation: np.ndarray, objects: tuple[int, ...], merge: bool, exclude_void: bool = True):
        number = np.zeros(256, np.uint8)
        number[list(objects)] = np.arange(1, len(objects) + 1)
        self.single = number[annotation]
        self.n_objects = len(objects)
        self.merge = merge
        void = annotation == VOID
        self.void = void if exclude_void and void.any() else None
        masks = self.single[None] > 0 if merge else self.single == np.arange(1, len(objects) + 1)[:, None, None]
        self.outlines = Outlines(pack(masks), annotation.shape)


class _Labels:
    """The labels 1 to K of one frame beside the targets of a `_Truth`, and one label more that is always empty."""

    def __init__(self, labels: np.ndarray, n_labels: int, truth: _Truth):
        self.truth = truth
        self.size = labels.shape
        self.table = contingency(labels, truth.single, truth.void, (n_labels + 2, truth.n_objects + 1))
        self.present = np.flatnonzero(self.table[1:].sum(1))
        self.masks = pack(labels == (self.present + 1).astype(np.uint8)[:, None, None])
        if truth.void is not None:
            self.masks &= ~pack(truth.void)

    @property
    def merged_table(self) -> np.ndarray:
        """Contingency table (K + 2, 2) of the labels and the union of the objects."""
        return np.stack([self.table[:, 0], self.table[:, 1:].sum(1)], axis=1)

    @cached_property
    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """J and F, (K + 1, G) each; the last row is the empty label's."""
        table = self.merged_table if self.truth.merge else self.table
        with_empty = np.concatenate([self.masks, np.zeros((1, *self.masks.shape[1:]), self.masks.dtype)])
        f = boundary_f_matrix(Outlines(with_empty, self.size), self.truth.outlines)
        every = np.repeat(f[-1:], len(table) - 1, axis=0)
        every[self.present] = f[:-1]
        return jaccard_matrix(table), every

    def scores_of_union(self, chosen: Iterable[int]) -> np.ndarray:
        """J and F, (2, 1), of the union of some labels against the merged objects."""
        member = np.zeros(len(self.table), bool)
        member[list(chosen)] = True
        table = np.stack([self.merged_table[~member].sum(0), self.merged_table[member].sum(0)])
        union = np.bitwise_or.reduce(self.masks[member[self.present + 1]], axis=0, keepdims=True)
        f = boundary_f_matrix(Outlines(union, self.size), self.truth.outlines)
        return np.stack([jaccard_matrix(table)[0], f[0]])


def _more_object_than_background(table: np.ndarray) -> np.ndarray:
    """Labels whose IoU with the target exceeds the IoU with the background; the table is (labels, 2)."""
    area, total = table[1:].sum(1, keepdims=True), table.sum(0)
    overlap = table[1:] / np.maximum(area + total - table[1:], 1)
    return np.flatnonzero(overlap[:, 1] > overlap[:, 0]) + 1


def _assign(quality: np.ndarray, labels: Iterable[int], n_empty: int) -> tuple[np.ndarray, tuple[int | None, ...]]:
    """Best assignment of labels and ``n_empty`` empty masks to the targets.

    Args:
        quality: (K + 1, G), the last row belonging to an empty mask.
        labels: the labels on offer, from 1.
        n_empty: how many times the empty mask is on offer.

    Returns:
        For every target the row of ``quality``, and the label (None for an empty mask).
    """
    n_labels = len(quality) - 1
    rows = np.array([label - 1 for label in labels] + [n_labels] * n_empty)
    chosen, targets = linear_sum_assignment(quality[rows], maximize=True)
    of_target = np.empty(quality.shape[1], np.intp)
    of_target[targets] = rows[chosen]
    return of_target, tuple(int(row) + 1 if row < n_labels else None for row in of_target)


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
    rows, tracks = _assign((j.mean(0) + f.mean(0)) / 2, labels, max(0, n_targets - len(labels)))
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
