"""Which frames correspond, and what their correspondence adds to the features."""

import pytest
import torch
from torch.nn import functional as F

from objslot.errors import UserError
from objslot.models.correspondence import TemporalFusion, draw_other_frames, gather_frames, previous_frames


@pytest.mark.parametrize("count", [1, 2, 3])
def test_other_frames_are_other_different_and_all_drawn(count):
    index = draw_other_frames(500, 4, count)
    assert index.shape == (500, 4, count)
    own = torch.arange(4).view(1, 4, 1)
    assert (index != own).all()
    assert (index.sort(-1).values.diff(dim=-1) > 0).all()
    for frame in range(4):
        share = torch.bincount(index[:, frame].flatten(), minlength=4) / 500
        expected = torch.full((4,), count / 3)
        expected[frame] = 0
        torch.testing.assert_close(share, expected, atol=0.1, rtol=0)


def test_other_frames_repeat_with_a_seed():
    draws = [draw_other_frames(8, 4, 1, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_self_sampling_and_too_many_others():
    assert torch.equal(draw_other_frames(2, 3, 1, sampling="self")[1, :, 0], torch.arange(3))
    with pytest.raises(UserError, match="n_other: got 3, expected at most 2 other frames in clips of 3"):
        draw_other_frames(1, 3, 3)


def test_previous_frames():
    assert previous_frames(4).tolist() == [1, 0, 1, 2]
    assert previous_frames(1).tolist() == [0]
    assert previous_frames(3, sampling="self").tolist() == [0, 1, 2]


def test_gather_frames():
    features = torch.randn(2, 3, 5, 4)
    index = draw_other_frames(2, 3, 2)
    found = gather_frames(features, index)
    for clip in range(2):
        for frame in range(3):
            for place in range(2):
                assert torch.equal(found[clip, frame, place], features[clip, index[clip, frame, place]])


def by_hand(fusion, keys, others, grid, training_grid):
    """X = F + W C + b with the maps made one by one, resized, then averaged."""
    maps = []
    for other in others:
        if fusion.correspondence == "cosine":
            scores = F.cosine_similarity(keys[:, None], other[None, :], dim=-1) / fusion.temperature
        else:
            scores = keys @ other.T
        image = scores.unflatten(1, grid).unsqueeze(1)
        maps.append(F.interpolate(image, training_grid, mode="bilinear", align_corners=False).flatten(1))
    embedding = torch.stack(maps).mean(0) @ fusion.embed.weight.T + fusion.embed.bias
    if fusion.correspondence == "cosine":
        embedding = (
            F.layer_norm(embedding, embedding.shape[-1:], fusion.norm.weight, fusion.norm.bias) * fusion.scale
        )
    return embedding


@pytest.mark.parametrize("correspondence", ["cosine", "raw"])
@pytest.mark.parametrize("grid", [(3, 4), (5, 7)])
@pytest.mark.parametrize("count", [1, 3])
def test_fusion_by_hand(correspondence, grid, count):
    positions, training_grid = grid[0] * grid[1], (3, 4)
    fusion = TemporalFusion(6, training_grid, correspondence=correspondence, temperature=0.3).double()
    if correspondence == "cosine":
        torch.nn.init.constant_(fusion.scale, 0.7)
    keys = torch.randn(positions, 8, dtype=torch.float64)
    others = torch.randn(count, positions, 8, dtype=torch.float64)
    features = torch.randn(positions, 6, dtype=torch.float64)
    fused, ratio = fusion(features, fusion.correspond(keys, fusion.prepare(others, grid).mean(0)))
    expected = by_hand(fusion, keys, others, grid, training_grid)
    torch.testing.assert_close(fused, features + expected)
    torch.testing.assert_close(
        ratio.double(), (expected.norm(dim=-1) / features.norm(dim=-1)).mean(), rtol=1e-5, atol=0
    )
    assert not ratio.requires_grad


def test_scale_starts_at_one_and_learns():
    fusion = TemporalFusion(6, (2, 2))
    keys = torch.randn(4, 8)
    correspondence = fusion.correspond(keys, fusion.prepare(torch.randn(4, 8), (2, 2)))
    fusion(torch.randn(4, 6), correspondence)[0].square().sum().backward()
    assert fusion.scale == 1
    assert fusion.scale.grad != 0
