"""Equality with a plain transcription of the published definitions of J, F, statistics and the two tasks."""

import math

import numpy as np
import pytest
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from objslot.data.segmentation import VideoSegmentation
from objslot.data.sequences import ArraySequence
from objslot.evaluation import evaluate_sequence
from objslot.evaluation.measures import boundary_f, jaccard, statistics


def plain_jaccard(prediction, truth, void):
    intersection = (prediction & truth & ~void).sum()
    union = ((prediction | truth) & ~void).sum()
    return 1.0 if union == 0 else intersection / union


def plain_boundary(mask):
    east, south, southeast = np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)
    east[:, :-1], south[:-1], southeast[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    edge = (mask ^ east) | (mask ^ south) | (mask ^ southeast)
    edge[-1] = mask[-1] ^ east[-1]
    edge[:, -1] = mask[:, -1] ^ south[:, -1]
    edge[-1, -1] = False
    return edge


def plain_boundary_f(prediction, truth, void):
    radius = math.ceil(0.008 * np.linalg.norm(truth.shape))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = x * x + y * y <= radius * radius
    ours, theirs = plain_boundary(prediction & ~void), plain_boundary(truth & ~void)
    n_ours, n_theirs = ours.sum(), theirs.sum()
    if n_ours == 0 and n_theirs == 0:
        precision = recall = 1
    elif n_ours == 0:
        precision, recall = 1, 0
    elif n_theirs == 0:
        precision, recall = 0, 1
    else:
        precision = (ours & ndimage.binary_dilation(theirs, disk)).sum() / n_ours
        recall = (theirs & ndimage.binary_dilation(ours, disk)).sum() / n_theirs
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def plain_statistics(values):
    cut = [math.floor(1 + i * (len(values) - 1) / 4 + 0.5 + 1e-9) - 1 for i in range(5)]
    quarters = [values[cut[i] : cut[i + 1] + 1] for i in range(4)]
    return np.mean(values), np.mean(np.array(values) > 0.5), np.mean(quarters[0]) - np.mean(quarters[3])


def plain_tables(tracks, annotations, n_tracks, n_objects, exclude_void):
    """J and F of every track and object over time: (K, G, T) each."""
    j, f = (np.zeros((n_tracks, n_objects, len(tracks))) for _ in range(2))
    for t, (labels, truth) in enumerate(zip(tracks, annotations, strict=True)):
        void = (truth == 255) & exclude_void
        for k in range(n_tracks):
            for g in range(n_objects):
                masks = labels == k + 1, truth == g + 1
                j[k, g, t], f[k, g, t] = plain_jaccard(*masks, void), plain_boundary_f(*masks, void)
    return j, f


def plain_unsupervised(tracks, annotations):
    n_objects = int(np.where(annotations[0] == 255, 0, annotations[0]).max())
    j, f = plain_tables(tracks, annotations, max(int(tracks.max()), n_objects), n_objects, True)
    rows, columns = linear_sum_assignment(-(j.mean(2) + f.mean(2)) / 2)
    order = np.argsort(columns)
    return j[rows[order], columns[order]], f[rows[order], columns[order]]


def plain_semi_supervised(tracks, annotations):
    n_objects = int(np.where(annotations[0] == 255, 0, annotations[0]).max())
    j, f = plain_tables(tracks[1:-1], annotations[1:-1], n_objects, n_objects, False)
    return [j[g, g] for g in range(n_objects)], [f[g, g] for g in range(n_objects)]


def random_masks(rng, height, width):
    """Blobs, noise, full and empty masks."""
    kind = rng.integers(5)
    if kind == 0:
        return np.zeros((height, width), bool)
    if kind == 1:
        return np.ones((height, width), bool)
    noise = rng.random((height, width))
    if kind == 2:
        return noise < rng.choice([0.002, 0.05, 0.5])
    return ndimage.gaussian_filter(noise, max(1, min(height, width) / 12)) > 0.5


SIZES = [(1, 1), (1, 64), (64, 1), (2, 3), (5, 63), (33, 64), (40, 65), (70, 130), (130, 200), (301, 157)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_j_and_f_equal_the_plain_definitions(height, width):
    rng = np.random.default_rng(height * 1000 + width)
    for _ in range(12):
        prediction, truth = random_masks(rng, height, width), random_masks(rng, height, width)
        void = rng.random((height, width)) < rng.choice([0, 0.1])
        assert jaccard(prediction, truth, void) == plain_jaccard(prediction, truth, void)
        assert boundary_f(prediction, truth, void) == plain_boundary_f(prediction, truth, void)


def test_j_and_f_equal_the_plain_definitions_at_full_size():
    rng = np.random.default_rng(0)
    truth = ndimage.gaussian_filter(rng.random((480, 854)), 25) > 0.505
    prediction = np.roll(truth, (7, 3), (0, 1)) ^ (rng.random(truth.shape) < 0.001)
    void = np.zeros_like(truth)
    found = boundary_f(prediction, truth)
    assert 0.2 < found < 0.95
    assert found == plain_boundary_f(prediction, truth, void)


@pytest.mark.parametrize("shift", [(0, 8), (8, 0), (5, 6), (0, 9), (6, 6), (9, 0)])
def test_tolerance_is_a_disk_of_radius_eight_at_480p(shift):
    truth = np.zeros((480, 854), bool)
    truth[300, 300] = True
    assert (boundary_f(np.roll(truth, shift, (0, 1)), truth) == 1) == (np.hypot(*shift) <= 8)


@pytest.mark.parametrize(
    ("height", "width", "radius"),
    [(75, 100, 1), (76, 100, 2), (250, 240, 3), (600, 620, 7), (1080, 1920, 18)],
)
def test_tolerance_is_rounded_up_from_the_diagonal(height, width, radius):
    truth = np.zeros((height, width), bool)
    truth[30, 30] = True
    assert boundary_f(np.roll(truth, radius, 1), truth) == 1
    assert boundary_f(np.roll(truth, radius + 1, 1), truth) < 1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9, 40, 66, 71, 104, 300])
def test_statistics(n):
    values = np.random.default_rng(n).random(n)
    assert statistics(values) == pytest.approx(plain_statistics(values), abs=1e-12)


def random_video(rng, n_frames=6, height=72, width=101, n_labels=4, smooth=5):
    noise = ndimage.gaussian_filter(
        rng.random((n_labels + 1, n_frames, height, width)), (0, 1, smooth, smooth)
    )
    return noise.argmax(0).astype(np.uint8)


@pytest.mark.parametrize(("n_objects", "n_tracks"), [(1, 1), (1, 5), (2, 2), (3, 6), (4, 2), (3, 0), (2, 20)])
def test_both_tasks_equal_the_plain_evaluation(n_objects, n_tracks):
    rng = np.random.default_rng(10 * n_objects + n_tracks)
    annotations = random_video(rng, n_labels=n_objects)
    annotations[2][annotations[2] == 1] = 0  # an object that leaves
    annotations[0, 0, 0] = n_objects
    annotations[rng.random(annotations.shape) < 0.03] = 255
    tracks = random_video(rng, n_labels=n_tracks) if n_tracks else np.zeros_like(annotations)
    if 0 < n_tracks <= n_objects:
        keep = rng.random(tracks.shape) < 0.8
        tracks = np.where(keep, np.minimum(np.where(annotations == 255, 0, annotations), n_tracks), tracks)
        tracks = tracks.astype(np.uint8)
    sequence = ArraySequence("made", annotations)
    sequence.first_frame_objects = True
    segmentation = VideoSegmentation("made", tracks)
    protocols = ["B"] + ["semi-supervised"] * (n_tracks <= n_objects)
    found = evaluate_sequence(segmentation, sequence, protocols)
    for protocol in protocols:
        plain = plain_unsupervised if protocol == "B" else plain_semi_supervised
        j, f = plain(tracks, annotations)
        for scores, values in (("J", j), ("F", f)):
            expected = np.mean([plain_statistics(value) for value in values], axis=0)
            names = [scores, f"{scores}_recall", f"{scores}_decay"]
            assert [found[protocol][name] for name in names] == pytest.approx(expected, abs=1e-12)
            assert found[protocol]["curve"][scores] == pytest.approx(np.mean(values, axis=0), abs=1e-12)
        assert found[protocol]["JF"] == pytest.approx((np.mean(j) + np.mean(f)) / 2, abs=1e-12)
        assert [entry["J"] for entry in found[protocol]["objects"]] == pytest.approx([v.mean() for v in j])
