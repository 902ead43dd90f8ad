"""Clips and augmentation: a pure function of the seed and the sample, one change for a whole clip."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from objslot.data import MEAN, STD, FrameFolder
from objslot.data.augment import N_PARAMETERS, Photometric, augment, normalise
from objslot.data.clips import ClipDataset, PixelSource, TooShort, clip_positions, load_clips, resize
from objslot.errors import UserError


def make_videos(root, count=5, n_frames=12):
    videos = []
    for video in range(count):
        folder = root / f"v{video}"
        folder.mkdir()
        for frame in range(n_frames):
            Image.fromarray(np.full((12, 16, 3), 16 * video + frame, np.uint8)).save(folder / f"{frame}.png")
        videos.append(FrameFolder(folder))
    return videos


def drawn(gray=0.0, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, order=(0, 1, 2, 3), sigma=0.0):
    return torch.tensor([[gray, brightness, contrast, saturation, hue, *order, sigma]])


@pytest.mark.parametrize(("n_frames", "stride"), [(100, 4), (13, 4), (12, 3), (7, 2), (6, 1), (4, 1)])
def test_positions_shrink_the_stride_of_a_short_video(n_frames, stride):
    starts = set()
    for seed in range(200):
        positions = clip_positions(n_frames, 4, 4, np.random.default_rng(seed))
        assert set(np.diff(positions)) == {stride}
        assert positions[0] >= 0
        assert positions[-1] < n_frames
        starts.add(positions[0])
    assert min(starts) == 0
    assert max(starts) >= min(n_frames - 1 - 3 * stride, 80)


def test_a_video_of_one_frame_is_too_short():
    with pytest.raises(TooShort, match="1 frame, too short for clips of 4"):
        clip_positions(1, 4, 4, np.random.default_rng(0))


def test_a_sample_depends_on_seed_and_number_alone(tmp_path):
    videos = make_videos(tmp_path)

    def make(seed=0):
        return ClipDataset(videos, PixelSource((8, 8)), seed=seed)

    first, again, other = make(), make(), make(1)
    forward = [first[n] for n in range(12)]
    for n in reversed(range(12)):
        repeated = again[n]
        for name in ("frames", "student", "teacher"):
            assert torch.equal(forward[n][name], repeated[name])
    assert any(not torch.equal(forward[n]["frames"], other[n]["frames"]) for n in range(12))
    assert not torch.equal(forward[0]["student"], forward[0]["teacher"])


def test_every_video_comes_once_in_a_pass(tmp_path):
    dataset = ClipDataset(make_videos(tmp_path), PixelSource((8, 8)))
    passes = [
        [int(dataset[n]["frames"][0, 0, 0, 0]) // 16 for n in range(5 * e, 5 * e + 5)] for e in range(4)
    ]
    assert all(sorted(order) == list(range(5)) for order in passes)
    assert len({tuple(order) for order in passes}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_gives_the_asked_batches_in_order(tmp_path, workers):
    dataset = ClipDataset(make_videos(tmp_path), PixelSource((8, 8)), frames=3)
    numbers = [[7, 8], [9, 10], [3, 100]]
    batches = list(load_clips(dataset, numbers, workers=workers))
    for batch, expected in zip(batches, numbers, strict=True):
        assert batch["frames"].shape == (2, 3, 3, 8, 8)
        assert batch["student"].shape == (2, N_PARAMETERS)
        for clip, number in zip(batch["frames"], expected, strict=True):
            assert torch.equal(clip, dataset[number]["frames"])


def test_a_video_that_cannot_be_read_is_replaced_and_reported_once(tmp_path):
    videos = make_videos(tmp_path, 3)
    for file in videos[1].files:
        file.unlink()
    videos[2] = UserError("gone")
    dataset = ClipDataset(videos, PixelSource((8, 8)))
    items = [dataset[n] for n in range(6)]
    assert all(int(item["frames"].max()) < 16 for item in items)
    reported = [failure for item in items for failure in item["failures"]]
    assert sorted(index for index, _ in reported) == [1, 2]
    assert all(isinstance(error, UserError) for _, error in reported)

    for file in videos[0].files:
        file.unlink()
    batch = next(iter(load_clips(dataset, [[6, 7]], workers=1)))
    assert list(batch) == ["failures"]
    assert [index for index, _ in batch["failures"]] == [0]


def test_resize_keeps_a_frame_of_the_right_size_and_averages_a_larger_one():
    frames = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(resize(frames, (8, 8)), frames.permute(0, 3, 1, 2))
    flat = torch.full((1, 40, 60, 3), 77, dtype=torch.uint8)
    assert torch.equal(resize(flat, (16, 16)), torch.full((1, 3, 16, 16), 77, dtype=torch.uint8))
    stripes = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    stripes[:, ::2] = 200
    assert (resize(stripes, (8, 8)).float() - 100).abs().max() < 10


def test_normalise():
    frames = torch.rand(2, 3, 4, 4)
    for channel in range(3):
        expected = (frames[:, channel] - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(normalise(frames)[:, channel], expected)


class TestAugment:
    clip = torch.rand(1, 2, 3, 6, 7, generator=torch.Generator().manual_seed(3)) * 0.5 + 0.25

    def luma(self, frames):
        return frames[:, :, 0] * 0.299 + frames[:, :, 1] * 0.587 + frames[:, :, 2] * 0.114

    def test_nothing_drawn_changes_nothing(self):
        torch.testing.assert_close(augment(self.clip, drawn()), self.clip)

    def test_brightness_and_saturation(self):
        torch.testing.assert_close(augment(self.clip, drawn(brightness=1.2)), self.clip * 1.2)
        luma = self.luma(self.clip).unsqueeze(2)
        expected = (self.clip * 0.7 + 0.3 * luma).clamp(0, 1)
        torch.testing.assert_close(augment(self.clip, drawn(saturation=0.7)), expected)

    def test_contrast_is_about_the_mean_luma_of_the_clip(self):
        expected = self.clip * 0.6 + 0.4 * self.luma(self.clip).mean()
        torch.testing.assert_close(augment(self.clip, drawn(contrast=0.6)), expected)

    def test_grayscale(self):
        gray = augment(self.clip, drawn(gray=1.0))
        torch.testing.assert_close(gray, self.luma(self.clip).unsqueeze(2).expand_as(gray))

    def test_hue_turns_the_colour_circle(self):
        red = torch.tensor([0.7, 0.3, 0.3]).view(1, 1, 3, 1, 1)
        for turn in (-0.1, 0.05, 0.1):
            turned = augment(red, drawn(hue=turn)).flatten()
            hue = colorsys.rgb_to_hsv(*turned.tolist())[0]
            assert abs((hue - turn + 0.5) % 1 - 0.5) < 0.05
            assert abs(float(turned @ torch.tensor([0.299, 0.587, 0.114])) - 0.4196) < 1e-3

    def test_the_order_is_followed(self):
        factors = {"brightness": 1.3, "contrast": 0.7}
        first = augment(self.clip, drawn(**factors))
        expected = (self.clip * 1.3) * 0.7 + 0.3 * self.luma(self.clip * 1.3).mean()
        torch.testing.assert_close(first, expected.clamp(0, 1))
        second = augment(self.clip, drawn(**factors, order=(1, 0, 2, 3)))
        torch.testing.assert_close(
            second, ((self.clip * 0.7 + 0.3 * self.luma(self.clip).mean()) * 1.3).clamp(0, 1)
        )

    def test_blur_is_a_gaussian_that_keeps_a_flat_frame(self):
        flat = torch.full((1, 1, 3, 9, 12), 0.4)
        torch.testing.assert_close(augment(flat, drawn(sigma=1.5)), flat)
        point = torch.zeros(1, 1, 3, 21, 25)
        point[..., 10, 12] = 1
        blurred = augment(point, drawn(sigma=1.2))[0, 0, 0]
        row, column = torch.arange(21)[:, None] - 10, torch.arange(25) - 12
        expected = torch.exp(-(row**2 + column**2) / (2 * 1.2**2))
        torch.testing.assert_close(blurred, expected / expected.sum(), atol=1e-5, rtol=0)

    def test_a_clip_of_a_batch_is_changed_as_it_is_alone(self):
        random = np.random.default_rng(5)
        clips = torch.rand(8, 2, 3, 10, 12)
        parameters = torch.stack([Photometric().draw(random) for _ in range(8)])
        together = augment(clips, parameters)
        for n in range(8):
            torch.testing.assert_close(together[n : n + 1], augment(clips[n : n + 1], parameters[n : n + 1]))
        assert together.min() >= 0
        assert together.max() <= 1

    def test_frames_of_a_clip_are_changed_alike(self):
        still = torch.rand(1, 1, 3, 8, 8).expand(1, 3, 3, 8, 8)
        random = np.random.default_rng(1)
        for _ in range(20):
            changed = augment(still, Photometric().draw(random)[None])
            torch.testing.assert_close(changed[:, :1].expand_as(changed), changed)

    def test_what_is_drawn(self):
        random = np.random.default_rng(0)
        drawn = torch.stack([Photometric().draw(random) for _ in range(4000)])
        assert drawn.shape == (4000, N_PARAMETERS)
        jittered = (drawn[:, 1:4] != 1).any(dim=1)
        assert abs(drawn[:, 0].mean() - 0.2) < 0.03
        assert abs(jittered.float().mean() - 0.8) < 0.03
        assert abs((drawn[:, 9] > 0).float().mean() - 0.5) < 0.03
        factors, turn, sigma = drawn[jittered, 1:4], drawn[jittered, 4], drawn[drawn[:, 9] > 0, 9]
        assert 0.6 <= factors.min() < 0.61 < 1.39 < factors.max() <= 1.4
        assert -0.1 <= turn.min() < -0.098 < 0.098 < turn.max() <= 0.1
        assert 0.1 <= sigma.min() < 0.12 < 1.98 < sigma.max() <= 2.0
        assert len(set(map(tuple, drawn[:, 5:9].tolist()))) == 24
