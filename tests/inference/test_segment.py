import numpy as np
import pytest
import torch
from torch.nn import functional as F

from objslot.errors import UserError
from objslot.inference import colour_null, frozen_backbone, segment_video
from objslot.inference.figure import find_figure
from objslot.inference.refine import refine
from objslot.inference.regions import encode_video
from objslot.inference.segment import draw_regions, model_regions, strongest_region, to_segmentation


def test_strongest_region_is_the_argmax_after_upsampling():
    torch.manual_seed(0)
    masks = (5 * torch.randn(6, 4, 5)).softmax(0)
    expected = F.interpolate(masks[None], (32, 40), mode="bilinear", align_corners=False)[0].argmax(0) + 1
    agreement = (strongest_region(masks, (32, 40)) == expected).float().mean()
    assert agreement > 0.98


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (4, 5), (33, 21), (200, 9)])
def test_strongest_region_of_any_size(size):
    """With two regions, each comes first or second everywhere, and nothing but rounding may differ."""
    torch.manual_seed(1)
    masks = torch.randn(2, 4, 5, dtype=torch.float64).softmax(0)
    upsampled = F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0]
    clear = (upsampled[0] - upsampled[1]).abs() > 1e-4
    assert torch.equal((strongest_region(masks, size) - 1)[clear].long(), upsampled.argmax(0)[clear])
    assert clear.float().mean() > 0.9
    many = torch.zeros(255, 4, 5)
    many[254], many[17] = 0.5, 0.5
    assert (strongest_region(many, size) == 18).all()


def test_segmentation_has_the_size_of_the_video_and_repeats(model, video):
    seen = []
    first = segment_video(model, video, seed=4, progress=lambda done, total: seen.append((done, total)))
    again = segment_video(model, video, seed=4)
    assert first.tracks.shape == (19, 40, 56)
    assert first.partition.min() >= 1 and first.partition.max() <= 6
    assert np.array_equal(first.tracks, again.tracks) and np.array_equal(first.partition, again.partition)
    assert seen[-1] == (19, 19)
    assert model.training


def test_every_background_region_belongs_to_one_track(model, video):
    found = segment_video(model, video)
    objects = np.isin(found.tracks, found.foreground)
    assert objects.any() and not objects.all()
    for region in np.unique(found.partition):
        background = found.tracks[(found.partition == region) & ~objects]
        assert len(np.unique(background)) <= 1


def test_more_instances_than_in_training(model, video):
    found = segment_video(model, video, instances=5, iterations=1)
    assert found.partition.max() <= 15


def test_the_oracle_picks_among_whole_clusters_of_colour(video):
    cut, whole = (colour_null(video, clusters=4, merge_foreground=merge).partition for merge in (True, False))
    assert (cut == whole).all() and len(np.unique(whole)) == 4


def test_the_colour_null_finds_a_coloured_square(video):
    found = colour_null(video, clusters=4, merge_foreground=True)
    truth = np.zeros((19, 40, 56), bool)
    for t in range(19):
        truth[t, 12:28, 4 + 2 * t : 20 + 2 * t] = True
    foreground = np.isin(found.tracks, found.foreground)
    assert (foreground & truth).sum() / (foreground | truth).sum() > 0.8


def test_the_frozen_backbone_uses_the_encoder(model, video):
    found = frozen_backbone(model.encoder, video, resolution=32, clusters=3)
    assert found.partition.max() <= 3
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.normal_()
    again = frozen_backbone(model.encoder, video, resolution=32, clusters=3)
    assert not np.array_equal(again.partition, found.partition)


def test_features_that_are_known_are_not_made_again(model, video):
    features = list(encode_video(model.encoder, video, short_side=32))
    whole = segment_video(model, video)
    frozen = frozen_backbone(model.encoder, video, resolution=32, clusters=3)
    model.encoder.forward = None
    again = to_segmentation(model_regions(model, video, features=features), video)
    assert np.array_equal(again.partition, whole.partition)
    again = frozen_backbone(model.encoder, video, resolution=32, clusters=3, features=features)
    assert np.array_equal(again.partition, frozen.partition)


def test_more_clusters_than_positions(model, array_video):
    video = array_video(torch.randint(0, 255, (1, 16, 16, 3), dtype=torch.uint8))
    assert frozen_backbone(model.encoder, video, resolution=16, clusters=8).partition.max() <= 4


def test_a_video_without_frames_is_refused(model, array_video):
    with pytest.raises(UserError, match="made: no frame could be read"):
        segment_video(model, array_video(torch.zeros(0, 16, 16, 3, dtype=torch.uint8)))


def test_one_object_is_what_the_drawing_calls_figure(model, video):
    regions = model_regions(model, video)
    drawing = draw_regions(regions, video, merge_foreground=True)
    assert drawing.foreground == (1,)
    found = find_figure(regions, video)
    for t in (0, 18):
        masks = regions.masks[t]
        evidence = refine(found[t][0], video.array[t])
        labels = drawing.frame(t, video.array[t])
        figure = labels.tracks == 1
        assert 0 < figure.mean() < 1
        assert np.array_equal(figure, evidence.numpy() >= 0)
        # Six instances inside the figure, one ground outside it, whose tracks are the semantics.
        assert labels.partition[figure].max() <= 6
        assert (labels.partition[~figure] == 7).all()
        strongest = strongest_region(masks, video.size).numpy()
        assert np.array_equal(labels.partition[figure], strongest[figure])
        semantics = (strongest[~figure] - 1) // 2
        for n in np.unique(semantics):
            assert len(np.unique(labels.tracks[~figure][semantics == n])) == 1
        assert len(np.unique(labels.tracks[~figure])) == len(np.unique(semantics))
