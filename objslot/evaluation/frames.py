"""What the protocols need of single frames, measured once for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from objslot.data.annotated import Sequence
from objslot.data.masks import VOID, labels_of
from objslot.data.segmentation import VideoSegmentation
from objslot.evaluation.measures import Outlines, boundary_f_matrix, contingency, jaccard_matrix
from objslot.evaluation.packed import pack, pack_labels


class Contents(NamedTuple):
    """What occurs in one frame, or in several."""

    annotated: frozenset[int]
    n_tracks: int
    n_regions: int

    @staticmethod
    def of_all(frames: list[Contents]) -> Contents:
        """What occurs in any of the frames."""
        return Contents(
            frozenset().union(*(frame.annotated for frame in frames)),
            max(frame.n_tracks for frame in frames),
            max(frame.n_regions for frame in frames),
        )


@dataclass(frozen=True)
class SequenceFrames:
    """The frames of one sequence and what was found in them."""

    segmentation: VideoSegmentation
    sequence: Sequence
    merge: bool
    protocols: tuple[str, ...]

    def contents(self, i: int) -> Contents:
        """Annotated labels and highest track and region of frame i."""
        tracks, partition = self.segmentation.frame(i)
        n_tracks = int(tracks.max(initial=0))
        n_regions = n_tracks if partition is None else int(partition.max(initial=0))
        return Contents(frozenset(labels_of([self.sequence.annotation(i)])), n_tracks, n_regions)

    def measure(self, i: int, objects: tuple[int, ...], n_tracks: int, n_regions: int) -> dict:
        """Measures of frame i.

        ``regions``: contingency table of the regions and the single objects. ``J`` and ``F``, (K + 1, G): of
        every track, and of an empty mask in the last row, against every target. ``A``, ``C``,
        ``semi-supervised``: J and F of every target, (2, G), where they can be had frame by frame.
        """
        tracks, partition = self.segmentation.frame(i)
        annotation, merge, protocols = self.sequence.annotation(i), self.merge, self.protocols
        truth = Truth(annotation, objects, merge)
        judged = Labels(tracks, n_tracks, truth)
        regions = judged if partition is None else Labels(partition, n_regions, truth)
        found = {"regions": regions.table[:-1]}
        if "B" in protocols or ("A" in protocols and not merge):
            found["J"], found["F"] = judged.scores
        if "A" in protocols and merge:
            found["A"] = judged.scores_of_union(self.segmentation.foreground)
        if "C" in protocols and merge:
            found["C"] = regions.scores_of_union(_more_object_than_background(regions.merged_table))
        elif "C" in protocols:
            j, f = regions.scores
            rows, _ = assign((j + f) / 2, range(1, n_regions + 1), len(objects))
            found["C"] = np.stack([j[rows, range(len(rows))], f[rows, range(len(rows))]])
        if "semi-supervised" in protocols:
            whole = Truth(annotation, objects, merge=False, exclude_void=False)
            j, f = Labels(tracks, len(objects), whole).scores
            found["semi-supervised"] = np.stack([j[:-1].diagonal(), f[:-1].diagonal()])
        return found


class Truth:
    """The targets of one frame: every object, or all of them merged into one."""

    def __init__(
        self, annotation: np.ndarray, objects: tuple[int, ...], merge: bool, exclude_void: bool = True
    ):
        number = np.zeros(256, np.uint8)
        number[list(objects)] = np.arange(1, len(objects) + 1)
        self.single = number[annotation]
        self.n_objects = len(objects)
        self.merge = merge
        void = annotation == VOID
        self.void = void if exclude_void and void.any() else None
        masks = pack(self.single[None] > 0) if merge else pack_labels(self.single, range(1, len(objects) + 1))
        self.outlines = Outlines(masks, annotation.shape)


class Labels:
    """Labels 1 to K of one frame beside the targets of a `Truth`, and a label more that is always empty."""

    def __init__(self, labels: np.ndarray, n_labels: int, truth: Truth):
        self.truth = truth
        self.size = labels.shape
        self.table = contingency(labels, truth.single, truth.void, (n_labels + 2, truth.n_objects + 1))
        self.present = np.flatnonzero(self.table[1:].sum(1))
        self.masks = pack_labels(labels, (int(k) + 1 for k in self.present))
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
        member = np.isin(np.arange(len(self.table)), list(chosen))
        table = np.stack([self.merged_table[~member].sum(0), self.merged_table[member].sum(0)])
        union = np.bitwise_or.reduce(self.masks[member[self.present + 1]], axis=0, keepdims=True)
        f = boundary_f_matrix(Outlines(union, self.size), self.truth.outlines)
        return np.stack([jaccard_matrix(table)[0], f[0]])


def _more_object_than_background(table: np.ndarray) -> np.ndarray:
    """Labels whose IoU with the target exceeds the IoU with the background; the table is (labels, 2)."""
    area, total = table[1:].sum(1, keepdims=True), table.sum(0)
    overlap = table[1:] / np.maximum(area + total - table[1:], 1)
    return np.flatnonzero(overlap[:, 1] > overlap[:, 0]) + 1


def assign(
    quality: np.ndarray, labels: Iterable[int], n_empty: int
) -> tuple[np.ndarray, tuple[int | None, ...]]:
    """Best assignment of labels and ``n_empty`` empty masks to the targets.

    Args:
        quality: (K + 1, G), the last row belonging to an empty mask.
        labels: the labels on offer, from 1.
        n_empty: how many times the empty mask is on offer.

    Returns:
        For every target the row of ``quality``, and the label (None for an empty mask).
    """
    from scipy.optimize import linear_sum_assignment

    n_labels = len(quality) - 1
    rows = np.array([label - 1 for label in labels] + [n_labels] * n_empty)
    chosen, targets = linear_sum_assignment(quality[rows], maximize=True)
    of_target = np.empty(quality.shape[1], np.intp)
    of_target[targets] = rows[chosen]
    return of_target, tuple(int(row) + 1 if row < n_labels else None for row in of_target)
