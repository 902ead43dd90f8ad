"""Learning figure and ground from what moves: two objects that differ from the ground alike, one of which moves."""

import torch
from torch.nn import functional as F

from objslot.errors import UserError
from objslot.inference.figure import learn_figure, teach
from objslot.models.encoder import FrameFeatures

APPEARANCES = F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
"""Of the ground, of what stays and of what moves."""


def places(t):
    """(12, 16) what there is on a grid of 8 x 8 pixels, and the column of the moving object in pixels."""
    column = 16 + 2 * t
    what = torch.zeros(12, 16, dtype=torch.long)
    what[2:5, 4:8] = 1
    what[7:10, round(column / 8) : round(column / 8) + 4] = 2
    return what, column


def made(array_video, frames=20):
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


def features(video, frames):
    generator = torch.Generator().manual_seed(2)
    keys = APPEARANCES[torch.stack([places(t)[0] for t in frames]).flatten(1)]
    keys = keys + 0.05 * torch.randn(keys.shape, generator=generator)
    for part in range(0, len(frames), 8):
        yield FrameFeatures(keys[None, part : part + 8], None, None, (12, 16))


def test_the_object_that_moves_is_figure_and_the_one_that_stays_is_not(model, array_video):
    told = []
    head = learn_figure(
        model,
        [made(array_video)],
        frames=10,
        features=features,
        progress=lambda done, total: told.append((done, total)),
    )
    ground, stays, moves = head(APPEARANCES)
    assert moves > 0.05 and stays < -0.05 and moves - stays > 0.2
    assert told == [(1, 1)]
    again = learn_figure(model, [made(array_video)], frames=10, features=features)
    assert torch.equal(again.weights, head.weights)


def test_it_learns_from_the_rule_and_not_from_an_earlier_head(model, array_video):
    head = learn_figure(model, [made(array_video)], frames=10, features=features)
    model.figure = head
    again = learn_figure(model, [made(array_video)], frames=10, features=features)
    assert torch.equal(again.weights, head.weights)


def test_the_encoder_is_asked_where_no_features_are_given(model, array_video):
    head = learn_figure(model, [made(array_video)], frames=8)
    assert head.centres.shape == (100, 24) and head.weights.isfinite().all()


def test_videos_that_cannot_teach_are_passed_over(model, array_video):
    class Broken(array_video):
        def read(self, indices):
            raise UserError("cannot be read")

    single, broken = made(array_video, 1), Broken(made(array_video).array)
    assert learn_figure(model, [], frames=10) is None
    assert learn_figure(model, [single, broken], frames=20) is None
    alone = learn_figure(model, [made(array_video)], frames=10, features=features)
    among = learn_figure(model, [broken, made(array_video), single], frames=30, features=features)
    torch.testing.assert_close(among.weights, alone.weights)


def test_with_many_videos_some_are_left_out(model, array_video):
    asked = []

    def noted(video, frames):
        asked.append((video.name, len(frames)))
        return features(video, frames)

    videos = [array_video(made(array_video).array, f"video {i}") for i in range(6)]
    learn_figure(model, videos, frames=24, features=noted)
    assert asked == [("video 0", 8), ("video 2", 8), ("video 4", 8)]


def test_motion_counts_as_far_as_it_agrees_with_the_rule():
    rule = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]).expand(3, 1, 4)
    moving = torch.tensor([[[0.0, 0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]])
    agreeing, contradicting, partly = teach(rule, moving)
    torch.testing.assert_close(agreeing, rule[0])
    torch.testing.assert_close(contradicting, rule[0])
    weight = 1 / 3**0.5
    torch.testing.assert_close(partly, torch.tensor([[0.0, 0.0, 1 / (1 + weight), 1.0]]))
    torch.testing.assert_close(teach(rule, torch.zeros(3, 1, 4)), rule)
