"""Measures between masks: region similarity J, boundary accuracy F, their statistics, FG-ARI and mBO.

J, F, mean, recall and decay are those of Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for
Video Object Segmentation", CVPR 2016, in the form of the published DAVIS-2017 evaluation.
"""

from __future__ import annotations

import math

import numpy as np

from objslot.evaluation import packed

BOUNDARY_TOLERANCE = 0.008
"""Tolerance of F as a share of the image diagonal; rounded up to whole pixels."""


def jaccard(prediction: np.ndarray, annotation: np.ndarray, void: np.ndarray | None = None) -> float:
    """Region similarity J, intersection over union; 1 when both masks are empty.

    Args:
        prediction, annotation: bool (H, W).
        void: bool (H, W), pixels that count neither way.

    Raises:
        ValueError: shapes that differ or are not (H, W).
    """
    prediction, annotation, void = _binary(prediction, annotation, void)
    union = np.count_nonzero((prediction | annotation) & ~void)
    return np.count_nonzero(prediction & annotation & ~void) / union if union else 1.0


def boundary_f(prediction: np.ndarray, annotation: np.ndarray, void: np.ndarray | None = None) -> float:
    """Boundary accuracy F, the harmonic mean of precision and recall of the boundary pixels.

    One-pixel boundaries are matched within a disk of radius ceil(0.008 * diagonal); both masks lose their
    void pixels first. 1 when neither mask has a boundary, 0 when only one has.

    Args:
        prediction, annotation: bool (H, W).
        void: bool (H, W), pixels that count neither way.

    Raises:
        ValueError: shapes that differ or are not (H, W).
    """
    prediction, annotation, void = _binary(prediction, annotation, void)
    ours, theirs = (Outlines(packed.pack((m & ~void)[None]), m.shape) for m in (prediction, annotation))
    return float(boundary_f_matrix(ours, theirs)[0, 0])


def _binary(prediction, annotation, void) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    prediction, annotation = np.asarray(prediction, dtype=bool), np.asarray(annotation, dtype=bool)
    void = np.zeros_like(prediction) if void is None else np.asarray(void, dtype=bool)
    for name, mask in (("annotation", annotation), ("void", void)):
        if mask.shape != prediction.shape or mask.ndim != 2:
            raise ValueError(
                f"{name} has shape {mask.shape}, prediction {prediction.shape}; expected the same (H, W)"
            )
    return prediction, annotation, void


class Outlines:
    """Boundaries of the masks of one frame, and the pixels near them.

    Args:
        masks: packed masks (K, H, words) without void pixels, from `packed.pack`.
        size: height and width in pixels.
    """

    def __init__(self, masks: np.ndarray, size: tuple[int, int]):
        self.edge = packed.boundary(masks, size[1])
        self.near = packed.dilate(self.edge, math.ceil(BOUNDARY_TOLERANCE * np.linalg.norm(size)))
        self.length = packed.count(self.edge)


def boundary_f_matrix(predictions: Outlines, annotations: Outlines) -> np.ndarray:
    """F, float64 (K, G), of every prediction against every annotation of a frame."""
    precision = np.zeros((len(predictions.length), len(annotations.length)))
    recall = np.zeros_like(precision)
    for g in range(precision.shape[1]):
        precision[:, g] = packed.count(predictions.edge & annotations.near[g])
        recall[:, g] = packed.count(annotations.edge[g] & predictions.near)
    n_predicted, n_annotated = predictions.length[:, None], annotations.length
    # A mask without boundary has nothing wrong in it: 1, against 0 for the other one unless that is empty
    # too.
    precision = np.where(n_predicted > 0, precision / np.maximum(n_predicted, 1), 1.0)
    recall = np.where(n_annotated > 0, recall / np.maximum(n_annotated, 1), 1.0)
    total = precision + recall
    return np.where(total > 0, 2 * precision * recall / np.where(total > 0, total, 1.0), 0.0)


def contingency(
    prediction: np.ndarray, annotation: np.ndarray, void: np.ndarray | None, shape: tuple[int, int]
) -> np.ndarray:
    """Pixels with label k in one map and g in the other, void pixels left out.

    Args:
        prediction, annotation: uint8 (H, W) index maps with labels below ``shape``.
        void: bool (H, W), or None.
        shape: number of labels of the two maps, 0 included.

    Returns:
        int64 ``shape``.
    """
    pair = prediction.astype(np.intp)
    pair *= shape[1]
    pair += annotation
    pair = pair.ravel() if void is None else pair[~void]
    return np.bincount(pair, minlength=shape[0] * shape[1]).reshape(shape)


def jaccard_matrix(table: np.ndarray) -> np.ndarray:
    """J of every prediction against every annotation; 1 when both are empty.

    Args:
        table: contingency tables (..., K + 1, G + 1), label 0 being background.

    Returns:
        float64 (..., K, G).
    """
    intersection = table[..., 1:, 1:]
    union = table[..., 1:, :].sum(-1)[..., None] + table[..., :, 1:].sum(-2)[..., None, :] - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall and decay of a measure over the frames of a video.

    Recall is the share of frames above 0.5; decay the mean of the first quarter minus that of the last, with
    the quarters of the published evaluation (neighbours share their border frame).

    Args:
        values: float (T,).
    """
    values = np.asarray(values, dtype=np.float64)
    cuts = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(np.int64)
    first, last = values[cuts[0] : cuts[1] + 1], values[cuts[3] : cuts[4] + 1]
    return float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean())


def foreground_ari(table: np.ndarray) -> float:
    """Adjusted Rand index over the annotated foreground pixels (Hubert and Arabie 1985).

    1 for the same partition, near 0 for chance; NaN without foreground pixels. With one object it can only be
    1 (one region covers it) or 0.

    Args:
        table: contingency table (K + 1, G + 1). Prediction 0 is a region like the others; annotation 0 is
        left out.
    """
    table = table[:, 1:].astype(np.float64)
    total = table.sum()
    if total == 0:
        return math.nan

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1)).sum() / 2)

    together, predicted, annotated = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = predicted * annotated / max(pairs(total), 1.0)
    highest = (predicted + annotated) / 2
    return 1.0 if highest == expected else (together - expected) / (highest - expected)


def mean_best_overlap(table: np.ndarray) -> float:
    """mBO: mean over the annotated objects of the best J of any predicted region; NaN without objects.

    Args:
        table: contingency table (K + 1, G + 1); label 0 of both is background.
    """
    present = table[:, 1:].sum(0) > 0
    if not present.any():
        return math.nan
    overlap = jaccard_matrix(table)[:, present]
    return float(overlap.max(0, initial=0.0).mean())
