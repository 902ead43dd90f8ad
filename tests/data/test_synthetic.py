import copy
import pickle

import numpy as np
import pytest
import torch

from objslot.data import FrameFolder, VideoFile
from objslot.data.sequences import open_sequences
from objslot.data.synthetic import SyntheticVideo, SyntheticVideos
from objslot.data.textures import PATTERNS
from objslot.errors import UserError

SEEDS = range(8)


def masks_of(video):
    return np.stack([video.annotation(i) for i in range(video.n_frames)])


@pytest.fixture(scope="module")
def videos():
    return [SyntheticVideo(seed, size=96) for seed in SEEDS]


def test_a_seed_gives_the_same_video():
    one, other = SyntheticVideo((3, 1), 4, 64), SyntheticVideos(3, 5, 4, 64)[1]
    assert one.patterns == other.patterns
    assert torch.equal(one.read(range(4)), other.read(range(4)))
    assert (masks_of(one) == masks_of(other)).all()
    assert one.identity() == other.identity()


def test_another_seed_gives_another_video():
    one, other = SyntheticVideo(3, 4, 64), SyntheticVideo(4, 4, 64)
    assert not torch.equal(one.read([0]), other.read([0]))
    assert one.identity() != other.identity()
    assert one.identity() != SyntheticVideo(3, 4, 72).identity()


def test_the_draw_is_the_same_on_every_machine():
    # Positions rest on the random draws alone; colours may differ by a rounding.
    video = SyntheticVideo(0, size=96)
    assert video.patterns == ("dots", "weave", "stripes")
    mask = video.annotation(7)
    centres = [np.argwhere(mask == k).mean(0) for k in (1, 2, 3)]
    np.testing.assert_allclose(centres, [[54.31, 61.34], [32.90, 45.02], [53.58, 11.76]], atol=0.5)


def test_every_object_is_seen_and_moves(videos):
    for video in videos:
        masks = masks_of(video)
        assert set(np.unique(masks)) == {0, 1, 2, 3}
        assert len(set(video.patterns)) == 3
        assert set(video.patterns) <= set(PATTERNS)
        for identity in (1, 2, 3):
            seen = [np.argwhere(mask == identity) for mask in masks if (mask == identity).any()]
            assert len(seen) >= video.n_frames - 3
            centres = np.array([pixels.mean(0) for pixels in seen])
            assert np.linalg.norm(centres - centres[0], axis=1).max() > 0.12 * 96


def test_an_object_passes_behind_a_nearer_one(videos):
    for video in videos:
        masks = masks_of(video)
        most_hidden = 0.0
        for k in (1, 2, 3):
            alone = copy.copy(video._scene)
            alone._objects = video._scene._objects[k - 1 : k]
            for t in range(video.n_frames):
                outline = alone.render(t)[1] == 1
                shown = masks[t][outline]
                # In front of it are nearer objects, never the background or a farther object.
                assert (shown >= k).all()
                most_hidden = max(most_hidden, (shown > k).sum() / max(outline.sum(), 1))
        assert most_hidden > 0.1


def test_the_background_moves(videos):
    for video in videos:
        both = (video.annotation(0) == 0) & (video.annotation(4) == 0)
        before, after = video.read([0, 4]).float()
        assert (before - after).abs()[torch.from_numpy(both)].mean() > 4


def test_colour_does_not_tell_the_objects(videos):
    # Even with the annotation to fit it, a colour for every layer finds little of the objects.
    overlaps = []
    for video in videos:
        frame, mask = video.read([8])[0].float().numpy(), video.annotation(8)
        means = np.stack([frame[mask == k].mean(0) for k in range(4)])
        nearest = np.linalg.norm(frame[..., None, :] - means, axis=-1).argmin(-1)
        for k in (1, 2, 3):
            found, true = nearest == k, mask == k
            overlaps.append((found & true).sum() / (found | true).sum())
    assert np.mean(overlaps) < 0.35


def test_reading(videos):
    video = videos[0]
    assert video.read([5, 0]).shape == (2, 96, 96, 3)
    assert video.read([]).shape == (0, 96, 96, 3)
    assert torch.equal(video.read([5, 0])[1], next(iter(video.frames())))
    assert torch.equal(torch.stack(list(video.frames(13))), video.read([13, 14, 15]))
    assert (video.sequence.annotation(6) == video.annotation(6)).all()
    assert video.sequence.video is video
    again = pickle.loads(pickle.dumps(video))
    assert torch.equal(again.read([3]), video.read([3]))
    with pytest.raises(UserError, match="no frame 16"):
        video.read([16])


def test_what_is_returned_may_be_written_to():
    video = SyntheticVideo(0, 2, 32)
    kept = video.read([0]), video.annotation(0)
    next(iter(video.frames())).zero_()
    video.read([0]).zero_()
    video.annotation(0)[:] = 9
    assert torch.equal(video.read([0]), kept[0])
    assert (video.annotation(0) == kept[1]).all()


@pytest.mark.parametrize("n_objects", [1, 2, len(PATTERNS)])
def test_number_of_objects_and_shape(n_objects):
    video = SyntheticVideo(0, 3, (48, 80), n_objects)
    assert video.size == (48, 80)
    assert video.read([2]).shape == (1, 48, 80, 3)
    assert video.annotation(0).max() == n_objects


def test_a_video_of_one_frame():
    assert SyntheticVideo(0, 1, 32).read([0]).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": ()}, "seed"),
        ({"size": 8}, "size"),
        ({"n_frames": 0}, "n_frames"),
        ({"n_objects": 0}, "n_objects"),
        ({"n_objects": len(PATTERNS) + 1}, "n_objects"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=f"^{message}: got"):
        SyntheticVideo(**arguments)


def test_no_videos():
    with pytest.raises(UserError, match="^n_videos"):
        SyntheticVideos(n_videos=0)


def test_written_as_a_data_set(tmp_path):
    videos = SyntheticVideos(2, 2, 3, 64)
    root = videos.write(tmp_path / "set")
    sequences = open_sequences("davis2017", root)
    assert [sequence.name for sequence in sequences] == [video.name for video in videos]
    for sequence, video in zip(sequences, videos, strict=True):
        assert torch.equal(sequence.video.read([0, 2]), video.read([0, 2]))
        assert all((sequence.annotation(i) == video.annotation(i)).all() for i in range(3))
    with pytest.raises(UserError, match="new or empty"):
        videos.write(root)


def test_written_as_frames_and_as_a_video_file(tmp_path):
    video = SyntheticVideo(1, 4, (48, 64))
    folder = FrameFolder(video.write_frames(tmp_path / "frames"))
    assert torch.equal(folder.read(range(4)), video.read(range(4)))
    path = video.write_mp4(tmp_path / "video.mp4")
    decoded = VideoFile(path).read(range(4)).float()
    assert (decoded - video.read(range(4)).float()).abs().mean() < 12
    for write, target in ((video.write_frames, folder.path), (video.write_mp4, path)):
        with pytest.raises(UserError, match="expected"):
            write(target)
