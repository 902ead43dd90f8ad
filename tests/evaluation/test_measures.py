import itertools
import math

import numpy as np
import pytest

from objslot.evaluation import packed
from objslot.evaluation.measures import (
    boundary_f,
    contingency,
    foreground_ari,
    jaccard,
    jaccard_matrix,
    mean_best_overlap,
)


def test_both_empty_is_a_perfect_match_and_one_empty_is_none():
    empty, square = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    square[5:10, 5:10] = True
    assert jaccard(empty, empty) == boundary_f(empty, empty) == 1
    assert jaccard(square, empty) == boundary_f(square, empty) == 0
    assert jaccard(empty, square) == boundary_f(empty, square) == 0


def test_void_pixels_count_neither_way():
    truth = np.zeros((40, 40), bool)
    truth[10:20, 10:20] = True
    prediction = truth.copy()
    prediction[25:30, 5:30] = True
    void = np.zeros_like(truth)
    assert jaccard(prediction, truth) < 1
    assert boundary_f(prediction, truth) < 1
    void[24:31] = True
    assert jaccard(prediction, truth, void) == 1
    assert boundary_f(prediction, truth, void) == 1


@pytest.mark.parametrize("measure", [jaccard, boundary_f])
def test_shapes_must_agree(measure):
    mask = np.zeros((4, 5), bool)
    with pytest.raises(ValueError, match=r"annotation has shape \(5, 4\), prediction \(4, 5\)"):
        measure(mask, mask.T)
    with pytest.raises(ValueError, match=r"void has shape \(4,\)"):
        measure(mask, mask, np.zeros(4, bool))
    with pytest.raises(ValueError, match=r"expected the same \(H, W\)"):
        measure(mask[0], mask[0])


def test_counting_bits_without_numpy_2(monkeypatch):
    masks = np.random.default_rng(0).random((3, 7, 130)) < 0.3
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert packed.count(packed.pack(masks)).tolist() == masks.sum((1, 2)).tolist()


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 70])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 140), (90, 65)])
def test_dilation_is_exact(height, width, radius):
    rng = np.random.default_rng(radius)
    mask = rng.random((height, width)) < 3 / (height * width)
    y, x = np.indices((height, width))
    expected = np.zeros_like(mask)
    for point in np.argwhere(mask):
        expected |= (y - point[0]) ** 2 + (x - point[1]) ** 2 <= radius**2
    found = packed.dilate(packed.pack(mask), radius)
    bits = np.unpackbits(found.view(np.uint8), axis=-1, bitorder="little")[:, :width]
    assert (bits.astype(bool) == expected).all()


def test_contingency_and_its_jaccard():
    rng = np.random.default_rng(1)
    prediction, truth = (rng.integers(0, n, (30, 40)).astype(np.uint8) for n in (5, 3))
    void = rng.random((30, 40)) < 0.2
    table = contingency(prediction, truth, void, (6, 3))
    assert table.shape == (6, 3)
    assert table[4, 2] == ((prediction == 4) & (truth == 2) & ~void).sum()
    j = jaccard_matrix(table)
    for k, g in itertools.product(range(1, 6), range(1, 3)):
        assert j[k - 1, g - 1] == jaccard(prediction == k, truth == g, void)


def pair_counting_ari(prediction, truth):
    """Adjusted Rand index from its definition over pairs of pixels."""
    same_prediction = prediction[:, None] == prediction
    same_truth = truth[:, None] == truth
    pairs = np.triu(np.ones_like(same_truth), 1)
    a, b = (same_prediction & pairs).sum(), (same_truth & pairs).sum()
    both, total = (same_prediction & same_truth & pairs).sum(), pairs.sum()
    expected = a * b / total
    return (both - expected) / ((a + b) / 2 - expected)


def test_foreground_ari_is_the_pair_counting_one_on_the_foreground():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 4, 300).astype(np.uint8)
    prediction = np.where(rng.random(300) < 0.6, truth, rng.integers(0, 5, 300)).astype(np.uint8)
    table = contingency(prediction[None], truth[None], None, (5, 4))
    kept = truth > 0
    assert foreground_ari(table) == pytest.approx(pair_counting_ari(prediction[kept], truth[kept]), abs=1e-12)
    assert foreground_ari(table[[3, 1, 0, 2, 4]]) == pytest.approx(foreground_ari(table))


def test_foreground_ari_at_its_edges():
    assert foreground_ari(np.array([[9, 0, 0], [0, 5, 0], [0, 0, 7]])) == 1
    assert foreground_ari(np.array([[9, 5, 7]])) == 0
    assert foreground_ari(np.array([[0, 0], [4, 12]])) == 1
    assert foreground_ari(np.array([[0, 1], [4, 0]])) == 1
    assert math.isnan(foreground_ari(np.array([[9, 0, 0]])))


def test_mean_best_overlap():
    table = np.array([[50, 2, 0, 0], [0, 8, 1, 0], [0, 0, 9, 0]])
    assert mean_best_overlap(table) == pytest.approx((8 / 11 + 9 / 10) / 2)
    assert mean_best_overlap(table[:1]) == 0
    assert math.isnan(mean_best_overlap(table[:, [0]]))
