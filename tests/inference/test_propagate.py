"""Carrying the first frame's objects on: against a plain form of the whole algorithm, and on a moving square."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import objslot
from objslot.errors import UserError
from objslot.inference import propagate as module
from objslot.inference.propagate import SETTINGS, PropagationSettings, propagate_masks
from objslot.inference.regions import normalise


def first_mask():
    mask = np.zeros((40, 56), np.uint8)
    mask[12:28, 4:20], mask[30:38, 30:50] = 1, 2
    mask[:2] = 255
    return mask


def plainly(encoder, video, mask, settings, grid):
    """The definition: the whole affinity of a frame to its context at once, in float64; grid is the encoder's own."""
    size = [side * encoder.patch_size for side in grid]
    n_objects = int(mask[mask < 255].max())
    one_hot = torch.stack([torch.from_numpy(np.where(mask == 255, 0, mask) == k) for k in range(n_objects + 1)])
    labels = [F.interpolate(one_hot[None].double(), grid, mode="area")[0].flatten(1).T]
    tokens, maps = [], [one_hot.double().argmax(0)]
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).double()
    near = torch.cdist(places, places) < settings.radius
    for t in range(video.n_frames):
        frame = normalise(video.read([t]), tuple(size))
        tokens.append(F.normalize(encoder(frame[None].double()).tokens[0, 0], dim=-1))
        if t == 0:
            continue
        context = [0, *range(max(1, t - settings.context), t)]
        far = {s: ~near if s else torch.zeros_like(near) for s in context}
        affinity = torch.cat([(tokens[t] @ tokens[s].T).masked_fill(far[s], -torch.inf) for s in context], 1)
        best, place = affinity.topk(min(settings.topk, affinity.shape[1]), dim=1)
        weight = (best / settings.temperature).softmax(1)
        mixed = (weight[..., None] * torch.cat([labels[s] for s in context])[place]).sum(1)
        labels.append(mixed)
        soft = mixed.T.unflatten(1, grid)
        maps.append(F.interpolate(soft[None], mask.shape, mode="bilinear", align_corners=False)[0].argmax(0))
    return torch.stack(maps).numpy()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_equals_the_plain_form_in_float64(model, video, backend):
    encoder = model.encoder.double()
    settings = PropagationSettings(stride=8, topk=5, radius=3, context=4)
    expected = plainly(encoder, video, first_mask(), settings, (5, 7))
    with objslot.use_backend(backend):
        found = propagate_masks(encoder, video, first_mask(), settings)
    assert np.array_equal(found.tracks[1:], expected[1:])
    assert (found.tracks[0] == np.where(first_mask() == 255, 0, first_mask())).all()
    assert len(np.unique(found.tracks[1:])) > 1 and found.foreground == (1, 2)


@pytest.mark.parametrize("stride", [16, 8])
def test_a_moving_square_is_followed(array_video, model, stride):
    """Tokens that are the colours themselves: what is carried on must be the square."""

    class Colours(torch.nn.Module):
        patch_size, width = 4, 3

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, frames):
            pooled = F.avg_pool2d(frames[0], 4)
            tokens = pooled.flatten(2).transpose(1, 2)[None]
            return module_features(tokens, tuple(pooled.shape[-2:]))

    def module_features(tokens, grid):
        from objslot.models.encoder import FrameFeatures

        return FrameFeatures(tokens, tokens, None, grid)

    frames = torch.full((30, 160, 240, 3), 30, dtype=torch.uint8)
    truth = np.zeros((30, 160, 240), np.uint8)
    for t in range(30):
        frames[t, 48:112, 4 * t : 4 * t + 64] = torch.tensor([250, 40, 40], dtype=torch.uint8)
        truth[t, 48:112, 4 * t : 4 * t + 64] = 1
    seen = []
    found = propagate_masks(
        Colours(), array_video(frames), truth[0], SETTINGS[stride], progress=lambda *done: seen.append(done)
    )
    overlap = ((found.tracks == 1) & (truth == 1)).sum((1, 2)) / ((found.tracks == 1) | (truth == 1)).sum((1, 2))
    assert overlap[0] == 1 and overlap.min() > 0.8
    assert seen[-1] == (30, 30)


def test_float32_frames_are_remembered_in_half_precision_to_nearly_the_same_maps(model, video):
    settings = PropagationSettings(stride=8, topk=5, radius=3, context=4)
    found = propagate_masks(model.encoder.float(), video, first_mask(), settings)
    exact = plainly(model.encoder.double(), video, first_mask(), settings, (5, 7))
    assert (found.tracks[1:] == exact[1:]).mean() > 0.995
    tokens = next(module._tokens(model.encoder.float(), video, (5, 7), 8))
    assert tokens.dtype == torch.float16
    torch.testing.assert_close(tokens.float().norm(dim=-1), torch.ones(5, 7), atol=2e-3, rtol=0)


def test_only_the_first_and_the_last_frames_are_remembered():
    frames = torch.arange(6.0).view(6, 1, 1, 1)
    memory = module._Memory(frames[0], frames[0], 3)
    for t in range(1, 6):
        memory.add(frames[t], frames[t])
        expected = {0, *range(max(1, t - 2), t + 1)}
        assert {int(x) for x in memory.keys.flatten()} == expected == {int(x) for x in memory.labels.flatten()}
        assert memory.keys[0] == 0


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((40, 56), np.uint8), "first mask with object 0, expected objects from 1 to 20"),
        (np.full((40, 56), 21, np.uint8), "first mask with object 21"),
        (np.ones((4, 5), np.uint8), "first mask of shape .4, 5., expected .40, 56."),
    ],
)
def test_a_first_mask_that_does_not_fit_is_refused(model, video, mask, message):
    with pytest.raises(UserError, match=message):
        propagate_masks(model.encoder, video, mask, SETTINGS[8])


def test_frames_under_a_position_are_refused(model, array_video):
    video = array_video(torch.zeros(2, 6, 56, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match="frames of 56 x 6 pixels, expected at least 16 each way"):
        propagate_masks(model.encoder, video, np.ones((6, 56), np.uint8), SETTINGS[16])
