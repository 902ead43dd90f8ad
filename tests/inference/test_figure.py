"""Figure and ground where contrast is not enough: two objects that differ from the ground alike, one of which moves."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from objslot.inference import spool
from objslot.inference.figure import find_figure, teach
from objslot.inference.regions import RegionSum
from objslot.inference.selection import figure_evidence

APPEARANCES = F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
"""Of the ground, of what stays and of what moves."""
STILL_FROM = 12
"""The frame from which nothing moves."""


def places(t):
    """(12, 16) what there is on a grid of 8 x 8 pixels, and the column of the moving object in pixels."""
    column = 16 + 2 * min(t, STILL_FROM)
    what = torch.zeros(12, 16, dtype=torch.long)
    what[2:5, 4:8] = 1
    what[7:10, round(column / 8) : round(column / 8) + 4] = 2
    return what, column


@pytest.fixture
def made(array_video):
    def make(frames=20):
        generator = torch.Generator().manual_seed(1)
        coarse = torch.rand(3, 3, 24, 32, generator=generator)
        ground, stays, moves = (255 * F.interpolate(coarse, (96, 128), mode="bicubic").clamp(0, 1)).to(torch.uint8)
        video = []
        for t in range(frames):
            picture, column = ground.clone(), places(t)[1]
            picture[:, 16:40, 32:64] = stays[:, :24, :32]
            picture[:, 56:80, column : column + 32] = moves[:, :24, :32]
            video.append(picture.permute(1, 2, 0))
        return array_video(torch.stack(video))

    return make


def regions_of(frames):
    """One region, so that only positions tell; features are the appearances and noise."""
    generator, collected = torch.Generator().manual_seed(2), RegionSum()
    for t in range(frames):
        noisy = APPEARANCES[places(t)[0].flatten()] + 0.05 * torch.randn(192, 24, generator=generator)
        collected.add(torch.ones(1, 1, 12, 16), F.normalize(noisy, dim=-1)[None])
    return collected.result(torch.zeros(1, dtype=torch.long))


def test_the_object_that_moves_is_more_figure_than_the_one_that_stays(made):
    regions, video = regions_of(20), made()
    found = find_figure(regions, video)
    assert len(found) == 20 and found[0].shape == (1, 12, 16)
    for t in range(20):
        what = places(t)[0]
        contrast = figure_evidence(regions, t, regions.masks[t])
        gain = found[t][0].float() - contrast
        lead = [maps[what == 2].mean() - maps[what == 1].mean() for maps in (contrast, found[t][0].float(), gain)]
        # Also where nothing moves any more: that was learned from the frames before.
        assert lead[2] > (0.1 if t < STILL_FROM else 0.03), (t, lead)
        assert found[t][0][what == 0].float().mean() < -0.2


def test_where_nothing_moves_contrast_decides(made):
    video = made(1)
    still = type(video)(video.array.expand(20, -1, -1, -1))
    regions = regions_of(20)
    moved, unmoved = find_figure(regions, made()), find_figure(regions, still)
    what = places(3)[0]
    contrast = (figure_evidence(regions, 3, regions.masks[3]) + 0.5).clamp(0, 1) - 0.5
    for kind in range(3):
        assert (unmoved[3][0][what == kind].float().mean() - contrast[what == kind].mean()).abs() < 0.1
    assert unmoved[3][0][what == 1].float().mean() > moved[3][0][what == 1].float().mean() + 0.03


def test_one_frame_and_spooled_frames(made, monkeypatch, tmp_path):
    assert find_figure(regions_of(1), made(1))[0].isfinite().all()
    whole = [maps.clone() for maps in find_figure(regions_of(20), made())]
    monkeypatch.setattr(spool, "IN_MEMORY", 1)
    spooled = find_figure(regions_of(20), made(), spool_in=tmp_path)
    assert all(np.array_equal(one, other) for one, other in zip(whole, spooled, strict=True))


def test_motion_counts_as_far_as_it_agrees_with_the_contrast():
    contrast = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]).expand(3, 1, 4)
    moving = torch.tensor([[[0.0, 0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]])
    agreeing, contradicting, partly = teach(contrast, moving)
    torch.testing.assert_close(agreeing, contrast[0])
    torch.testing.assert_close(contradicting, contrast[0])
    weight = 1 / 3**0.5
    torch.testing.assert_close(partly, torch.tensor([[0.0, 0.0, 1 / (1 + weight), 1.0]]))
    torch.testing.assert_close(teach(contrast, torch.zeros(3, 1, 4)), contrast)
