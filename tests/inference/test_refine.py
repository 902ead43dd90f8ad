"""The guided filter against its definition, and what it is for: edges of the picture."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from objslot.inference import refine as module
from objslot.inference.refine import refine


def disc(height=96, width=128, contrast=60):
    rows, columns = np.mgrid[:height, :width]
    inside = (rows - 40) ** 2 + (columns - 70) ** 2 < 24**2
    generator = np.random.default_rng(0)
    picture = generator.integers(90, 110, (height, width, 3))
    picture[inside] += contrast
    return torch.from_numpy(inside), torch.from_numpy(picture.astype(np.uint8))


def overlap(one, other):
    return ((one & other).sum() / (one | other).sum()).item()


def test_edges_are_those_of_the_picture():
    inside, picture = disc()
    coarse = F.interpolate(inside[None, None].float(), (6, 8), mode="area")[0, 0]
    plain = F.interpolate(coarse[None, None], inside.shape, mode="bilinear")[0, 0] > 0.5
    refined = refine(coarse, picture) > 0.5
    assert overlap(plain, inside) < 0.93
    assert overlap(refined, inside) > 0.96


def test_it_equals_its_definition_window_by_window(monkeypatch):
    """At full size and inside the picture: least squares in every window, the mean over the windows of a pixel."""
    monkeypatch.setattr(module, "_SHORT_SIDE", 12)
    monkeypatch.setattr(module, "_REACH", 6)
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (12, 15, 3), generator=generator, dtype=torch.uint8)
    soft = torch.rand(12, 15, generator=generator)
    colours, radius = picture.double().numpy() / 255, 2
    linear = np.zeros((12, 15, 4))

    def window(values, row, column):
        return values[max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1]

    for row in range(12):
        for column in range(15):
            i = window(colours, row, column).reshape(-1, 3)
            p = window(soft.double().numpy(), row, column).reshape(-1)
            covariance = np.cov(i.T, bias=True) + 1e-4 * np.eye(3)
            slope = np.linalg.solve(covariance, ((i - i.mean(0)) * (p - p.mean())[:, None]).mean(0))
            linear[row, column] = [*slope, p.mean() - slope @ i.mean(0)]
    expected = np.empty((12, 15))
    for row in range(12):
        for column in range(15):
            mean = window(linear, row, column).reshape(-1, 4).mean(0)
            expected[row, column] = mean[:3] @ colours[row, column] + mean[3]
    np.testing.assert_allclose(refine(soft, picture).numpy(), expected, atol=2e-4)


def test_it_commutes_with_scale_and_shift():
    """So the threshold may be put on the evidence before or after."""
    _, picture = disc()
    soft = torch.rand(6, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(refine(3 * soft - 1, picture), 3 * refine(soft, picture) - 1, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (17, 3), (130, 121)])
def test_any_size_and_a_flat_picture_stay_finite(size):
    soft = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    for picture in (torch.zeros(*size, 3, dtype=torch.uint8), torch.full((*size, 3), 255, dtype=torch.uint8)):
        refined = refine(soft, picture)
        assert refined.shape == size and refined.dtype == torch.float32
        assert refined.isfinite().all()
        assert soft.min() - 1e-3 <= refined.min() and refined.max() <= soft.max() + 1e-3
