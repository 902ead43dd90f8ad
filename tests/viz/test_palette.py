import numpy as np
import pytest
from PIL import Image

from objslot.viz import davis_palette, overlay_colors, write_indexed_png

# Published first entries of the PASCAL VOC / DAVIS palette, and its void colour.
PUBLISHED = {
    0: (0, 0, 0),
    1: (128, 0, 0),
    2: (0, 128, 0),
    3: (128, 128, 0),
    4: (0, 0, 128),
    5: (128, 0, 128),
    6: (0, 128, 128),
    7: (128, 128, 128),
    8: (64, 0, 0),
    15: (192, 128, 128),
    16: (0, 64, 0),
    255: (224, 224, 192),
}

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
DEFICIENCIES = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(linear):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = np.clip(linear, 0, 1) @ to_xyz.T / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def test_davis_palette_is_the_published_one():
    for index, color in PUBLISHED.items():
        assert tuple(davis_palette()[index]) == color


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_first_seven_colors_stay_apart_for_colour_blind_people(deficiency):
    srgb = overlay_colors()[1:8] / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = lab(linear @ np.array(DEFICIENCIES[deficiency]).T)
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(7, 1)]
    assert distance.min() > 10, distance.min()


def test_twenty_tracks_have_twenty_colors():
    assert len({tuple(color) for color in overlay_colors()[:21]}) == 21


def test_indexed_png_keeps_every_index(tmp_path):
    index = np.arange(256, dtype=np.uint8).reshape(8, 32)
    write_indexed_png(tmp_path / "a.png", index)
    image = Image.open(tmp_path / "a.png")
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), index)
    assert np.array_equal(np.asarray(image.convert("RGB")), davis_palette()[index])


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.int64), np.zeros((4, 4, 1), np.uint8)])
def test_indexed_png_refuses_other_arrays(tmp_path, bad):
    with pytest.raises(TypeError, match="index must be uint8"):
        write_indexed_png(tmp_path / "a.png", bad)
    assert not (tmp_path / "a.png").exists()
