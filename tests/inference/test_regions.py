import pytest
import torch
from torch.nn import functional as F

from objslot.errors import UserError
from objslot.inference import regions
from objslot.inference.regions import InstanceLinker, RegionSum, encode_video, frame_size
from objslot.inference.segment import model_regions


def test_statistics_are_those_of_the_whole_video():
    torch.manual_seed(0)
    masks = torch.rand(5, 3, 2, 4).softmax(1)
    features = F.normalize(torch.randn(5, 8, 6), dim=-1)
    collected = RegionSum()
    collected.add(masks[:2], features[:2])
    collected.add(masks[2:], features[2:])
    video = collected.result(torch.tensor([0, 0, 1]))
    found = video.statistics
    contrast = torch.stack(list(video.contrast))[:, 0].float()
    low, high = video.contrast_range

    weights = masks.flatten(2)
    torch.testing.assert_close(found.mass, weights.mean((0, 2)))
    for region in range(3):
        share = weights[:, region] / weights[:, region].sum()
        torch.testing.assert_close(found.feature[region], (share[..., None] * features).sum((0, 1)))
        inner = share.view(5, 2, 4)[:, 1, 1:3].sum()
        torch.testing.assert_close(found.border[region], 1 - inner)
        own = ((share.view(5, 2, 4) * contrast).sum() - low) / (high - low)
        torch.testing.assert_close(found.contrast[region], own, rtol=1e-2, atol=1e-2)


def test_linker_follows_instances_that_swap_places():
    torch.manual_seed(0)
    identities = F.normalize(torch.randn(2, 3, 16), dim=-1)
    link = InstanceLinker()
    orders = [torch.arange(3).expand(2, -1)]
    orders += [torch.stack([torch.randperm(3), torch.randperm(3)]) for _ in range(6)]
    for order in orders:
        frame = torch.take_along_dim(identities, order[..., None], 1) + 0.05 * torch.randn(2, 3, 16)
        index = link(frame)
        # Track p holds identity p: the instance it points at is the one where the shuffle put p.
        assert torch.equal(torch.take_along_dim(order, index, 1), torch.arange(3).expand(2, -1))


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((480, 854), 32, (32, 56)), ((854, 480), 32, (56, 32)), ((9, 900), 8, (8, 800))],
)
def test_frame_size_keeps_the_shape_in_whole_patches(model, size, short_side, expected):
    assert frame_size(model.encoder, size, short_side) == expected


def test_resolution_below_a_patch_is_refused(model):
    with pytest.raises(UserError, match="resolution: got 4 pixels, expected at least one patch of 8"):
        frame_size(model.encoder, (40, 56), 4)


def test_chunks_hold_every_frame_once(model, video):
    chunks = list(encode_video(model.encoder, video, short_side=32))
    assert sum(chunk.keys.shape[1] for chunk in chunks) == video.n_frames
    one_by_one = model.encoder(regions.normalise(video.read([17]), (32, 48))[None])
    torch.testing.assert_close(chunks[2].keys[:, 1], one_by_one.keys[:, 0], rtol=1e-4, atol=1e-5)


def test_regions_do_not_depend_on_the_chunks(model, video, monkeypatch):
    whole = model_regions(model, video)
    monkeypatch.setattr(regions, "CHUNK", 5)
    parts = model_regions(model, video)
    whole_masks, masks = torch.stack(list(whole.masks)), torch.stack(list(parts.masks))
    torch.testing.assert_close(whole_masks[1:], masks[1:], rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(masks.float().sum(1), torch.ones(19, *masks.shape[-2:]), rtol=0, atol=5e-3)
    assert whole.semantics.tolist() == [0, 0, 1, 1, 2, 2]


def test_too_many_instances_are_refused(model, video):
    with pytest.raises(UserError, match="instances: got 86 of each of 3 semantics, expected at most 84"):
        model_regions(model, video, instances=86)
