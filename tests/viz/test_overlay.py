import numpy as np
import pytest

from objslot.viz import colorize, contours, overlay, overlay_colors


def scene():
    frame = np.full((40, 60, 3), 100, np.uint8)
    index = np.zeros((40, 60), np.uint8)
    index[10:30, 5:25] = 1
    index[10:30, 25:50] = 2
    return frame, index


def test_contours_lie_on_both_sides_of_every_boundary_and_nowhere_else():
    _, index = scene()
    edge = contours(index)
    expected = np.zeros_like(edge)
    for y in range(40):
        for x in range(60):
            around = [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
            near = [index[a, b] for a, b in around if 0 <= a < 40 and 0 <= b < 60]
            expected[y, x] = index[y, x] > 0 and any(value != index[y, x] for value in near)
    assert np.array_equal(edge, expected)
    thick = contours(index, 3)
    assert thick[20, 7] and thick[20, 23] and not thick[20, 8] and not thick[20, 4]


def test_overlay_blends_inside_and_leaves_the_rest_alone():
    frame, index = scene()
    picture = overlay(frame, index, alpha=0.5, labels=False)
    assert np.array_equal(picture[index == 0], frame[index == 0])
    assert np.abs(picture[20, 15].astype(int) - (100 + overlay_colors()[1].astype(int)) // 2).max() <= 1
    assert np.array_equal(picture[10, 15], overlay_colors()[1])
    assert np.array_equal(frame, scene()[0])


def test_only_hides_the_other_objects():
    frame, index = scene()
    picture = overlay(frame, index, only=[2], labels=False)
    assert np.array_equal(picture[index == 1], frame[index == 1])
    assert not np.array_equal(picture[index == 2], frame[index == 2])


def test_labels_are_drawn_inside_the_object():
    frame, index = np.zeros((120, 160, 3), np.uint8), np.zeros((120, 160), np.uint8)
    index[20:100, 40:120] = 3
    changed = (overlay(frame, index) != overlay(frame, index, labels=False)).any(-1)
    assert changed.any()
    assert not changed[index == 0].any()


def test_colorize_uses_one_color_for_an_identity():
    _, index = scene()
    assert np.array_equal(colorize(index)[20, 40], overlay_colors()[2])


@pytest.mark.parametrize(
    "frame, index, message",
    [
        (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), "frame must be uint8"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8), "index must be uint8 of shape"),
    ],
)
def test_wrong_arrays_are_named(frame, index, message):
    with pytest.raises((TypeError, ValueError), match=message):
        overlay(frame, index)
