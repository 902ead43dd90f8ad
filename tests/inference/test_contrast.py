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


def measured(*videos):
    """The contrast (T, h, w) of all frames, and what measured it."""
    measure = BorderContrast()
    for features in videos:
        measure.observe(features, GRID)
    return torch.stack([measure(frame, GRID) for features in videos for frame in features]), measure


def test_the_object_contrasts_with_every_border():
    contrast, _ = measured(frames())
    assert contrast.shape == (5, *GRID)
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[2:4, 3:5] = True
    assert contrast[:, inside].min() > 0.7
    # Either ground resembles a part of the border alone, and that is enough.
    assert contrast[:, ~inside].max() < 0.4


def test_an_object_that_comes_in_over_the_border_still_contrasts():
    video = frames(20).unflatten(1, GRID)
    video[:2, 2:4] = video[:2, 2:4, 3:4]
    contrast, _ = measured(*video.flatten(1, 2).split(8))
    assert contrast[:, 2:4, 3:5].min() > 0.5


def test_range_is_that_of_all_frames():
    contrast, measure = measured(*(frames(seed=seed) for seed in range(40)))
    low, high = measure.range()
    assert low == pytest.approx(float(contrast.median()), abs=0.01)
    assert high == pytest.approx(float(contrast.quantile(0.995)), abs=0.01)


def test_the_sample_of_the_border_is_bounded_and_the_same_every_time():
    videos = [frames(seed=seed) for seed in range(30)]
    (first, measure), (second, _) = measured(*videos), measured(*videos)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert len(measure._sample) == 1000


def test_a_video_of_one_colour_has_no_contrast():
    contrast, measure = measured(torch.ones(2, 48, 1))
    assert contrast.abs().max() < 1e-6
    low, high = measure.range()
    assert high > low
