import pytest
import torch
from torch.nn import functional as F

from objslot.inference.contrast import BorderContrast

GRID = (6, 8)


def frames(count=5, seed=0):
    """Two kinds of ground that reach the border, and an object in the middle that is like neither."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.zeros(count, *GRID, 8)
    features[:, :3, :, 0] = features[:, 3:, :, 1] = 1
    features[:, 2:4, 3:5] = torch.eye(8)[2]
    features += 0.05 * torch.randn(features.shape, generator=generator)
    return F.normalize(features, dim=-1).flatten(1, 2)


def test_the_object_contrasts_with_every_border():
    contrast = BorderContrast()(frames(), GRID)
    assert contrast.shape == (5, *GRID)
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[2:4, 3:5] = True
    assert contrast[:, inside].min() > 0.7
    # Either ground resembles a part of the border alone, and that is enough.
    assert contrast[:, ~inside].max() < 0.4


def test_an_object_that_leaves_the_frame_for_a_moment_still_contrasts():
    video = frames(20).unflatten(1, GRID)
    video[7, 2:4] = video[7, 2:4, 3:4]
    measure = BorderContrast()
    found = torch.cat([measure(chunk.flatten(1, 2), GRID) for chunk in video.split(8)])
    assert found[:, 2:4, 3:5].min() > 0.5


def test_range_is_that_of_all_frames():
    measure = BorderContrast()
    contrast = torch.cat([measure(frames(seed=seed), GRID) for seed in range(40)])
    low, high = measure.range()
    assert low == pytest.approx(float(contrast.median()), abs=0.01)
    assert high == pytest.approx(float(contrast.quantile(0.995)), abs=0.01)


def test_the_sample_of_the_border_is_bounded_and_the_same_every_time():
    first, second = BorderContrast(), BorderContrast()
    for seed in range(30):
        torch.testing.assert_close(first(frames(seed=seed), GRID), second(frames(seed=seed), GRID), rtol=0, atol=0)
    assert len(first._sample) == 1000


def test_a_video_of_one_colour_has_no_contrast():
    measure = BorderContrast()
    contrast = measure(torch.ones(2, 48, 1), GRID)
    assert contrast.abs().max() < 1e-6
    low, high = measure.range()
    assert high > low
