"""Motion that is not the camera's, on textures moved by known amounts."""

import cv2
import pytest
import torch
from torch.nn import functional as F

from objslot.inference.motion import dominant_flow, own_motion


def texture(height, width, seed):
    coarse = torch.rand(1, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]


def scene(array_video, camera, own, size=(120, 160), frames=3):
    """The ground moves by `camera`, (rows, columns), from frame to frame, a square by `own`."""
    ground, square = texture(size[0] + 80, size[1] + 80, 0), texture(40, 40, 1)
    pictures = []
    for t in range(frames):
        top, left = 40 - t * camera[0], 40 - t * camera[1]
        picture = ground[:, top : top + size[0], left : left + size[1]].clone()
        top, left = 40 + t * own[0], 60 + t * own[1]
        picture[:, top : top + 40, left : left + 40] = square
        pictures.append((255 * picture).round().to(torch.uint8).permute(1, 2, 0))
    return array_video(torch.stack(pictures))


def found(video, grid=(30, 40)):
    return list(own_motion(video, [torch.zeros(1, *grid)] * video.n_frames))


@pytest.mark.parametrize(("camera", "own"), [((0, 0), (0, 4)), ((3, -8), (3, -4)), ((2, 10), (0, 0))])
def test_what_moves_otherwise_than_the_camera_stands_out(array_video, camera, own):
    for t, moving in enumerate(found(scene(array_video, camera, own))):
        assert moving.shape == (30, 40) and moving.min() >= 0 and moving.max() <= 1
        top, left = (40 + t * own[0]) // 4, (60 + t * own[1]) // 4
        assert moving[top + 2 : top + 8, left + 2 : left + 8].min() > 0.2
        ground = torch.ones(30, 40, dtype=torch.bool)
        ground[max(0, top - 3) : top + 14, max(0, left - 3) : left + 14] = False
        # What leaves the picture and what comes into it has no counterpart in one of the others.
        ground[:3] = ground[-3:] = ground[:, :4] = ground[:, -4:] = False
        assert moving[ground].quantile(0.9) < 0.1


@pytest.mark.parametrize("camera", [(0, 0), (4, -6)])
def test_nothing_stands_out_where_all_moves_with_the_camera(array_video, camera):
    for moving in found(scene(array_video, camera, camera)):
        assert moving[3:-3, 4:-4].quantile(0.98) < 0.1


def test_what_the_next_frame_hides_does_not_move(array_video):
    """The ground in front of the square is covered in the next frame only, so the frame before speaks for it."""
    video = scene(array_video, (0, 0), (0, 8))
    alone, both = found(array_video(video.array[1:]))[0], found(video)[1]
    hidden = (slice(11, 19), slice(27, 29))
    assert alone[hidden].mean() > 0.5
    assert both[hidden].mean() < 0.5 * alone[hidden].mean()


def test_the_figure_has_no_say_in_the_motion_of_the_camera():
    flow, trust = torch.zeros(2, 20, 30), torch.ones(20, 30)
    flow[0, :, 6:18] = 5.0
    assert dominant_flow(flow, trust)[0, :, 18:].abs().mean() > 0.5
    trust[:, 6:18] = 0.02
    torch.testing.assert_close(dominant_flow(flow, trust), torch.zeros(2, 20, 30), atol=1e-3, rtol=0)
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    moved = torch.stack([0.1 * x - 0.02 * y * x, 3 + 0.01 * x * x - 0.1 * y])
    torch.testing.assert_close(dominant_flow(moved, torch.ones(20, 30)), moved, atol=0.05, rtol=0)


def test_single_small_and_large_pictures(array_video):
    for size, frames in (((1, 1), 2), ((15, 40), 3), ((64, 64), 1)):
        for moving in found(array_video(torch.randint(0, 255, (frames, *size, 3), dtype=torch.uint8)), (2, 3)):
            assert torch.equal(moving, torch.zeros(2, 3))
    for size in ((16, 16), (500, 301)):
        video = array_video(torch.randint(0, 255, (2, *size, 3), dtype=torch.uint8))
        assert all(moving.isfinite().all() for moving in found(video, (2, 3)))


def test_the_threads_of_opencv_stay_as_they_were_and_make_no_difference(array_video):
    video, before = scene(array_video, (2, 3), (0, 0), (240, 320)), cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        first = found(video)
        cv2.setNumThreads(3)
        assert all(torch.equal(one, other) for one, other in zip(first, found(video), strict=True))
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)
