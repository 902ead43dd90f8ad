"""Motion that is not the camera's, on textures moved by known amounts."""

import pytest
import torch
from torch.nn import functional as F

from objslot.inference.motion import motion


def texture(height, width, seed):
    coarse = torch.rand(1, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]


def scene(camera, own, size=(120, 160)):
    """Two pictures: the ground moves by `camera`, (rows, columns), a square by `own`."""
    ground, square = texture(size[0] + 40, size[1] + 40, 0), texture(40, 40, 1)
    pictures = []
    for t in (0, 1):
        top, left = 20 - t * camera[0], 20 - t * camera[1]
        picture = ground[:, top : top + size[0], left : left + size[1]].clone()
        top, left = 40 + t * own[0], 60 + t * own[1]
        picture[:, top : top + 40, left : left + 40] = square
        pictures.append(picture)
    return [picture[None] for picture in pictures]


@pytest.mark.parametrize(("camera", "own"), [((0, 0), (0, 4)), ((3, -8), (3, -4)), ((2, 10), (0, 0))])
def test_what_moves_otherwise_than_the_camera_stands_out(camera, own):
    moving = motion(*scene(camera, own), torch.ones(1, 4, 4))[0]
    assert moving.shape == (120, 160)
    inside = torch.zeros(120, 160, dtype=torch.bool)
    inside[48:72, 68:92] = True
    outside = torch.zeros(120, 160, dtype=torch.bool)
    outside[12:28, 12:-12] = outside[-28:-12, 12:-12] = True
    assert moving[inside].median() > 3 * moving[outside].median()
    assert (moving[inside] > moving[outside].quantile(0.9)).float().mean() > 0.9


@pytest.mark.parametrize("camera", [(0, 0), (4, -6)])
def test_nothing_stands_out_where_all_moves_with_the_camera(camera):
    still = motion(*scene(camera, camera), torch.ones(1, 4, 4))[0, 12:-12, 12:-12]
    moving = motion(*scene(camera, (camera[0], camera[1] + 5)), torch.ones(1, 4, 4))[0, 48:72, 68:92]
    assert still.quantile(0.95) < 0.5 * moving.median()


def test_small_and_large_pictures():
    assert motion(torch.rand(2, 3, 7, 5), torch.rand(2, 3, 7, 5), torch.ones(2, 1, 1)).shape == (2, 7, 5)
    assert motion(torch.rand(1, 3, 1, 1), torch.rand(1, 3, 1, 1), torch.ones(1, 1, 1)).isfinite().all()
    assert motion(torch.rand(1, 3, 240, 480), torch.rand(1, 3, 240, 480), torch.ones(1, 1, 1)).shape == (1, 120, 240)
