import av
import numpy as np
import pytest

from objslot.viz import VideoWriter, contact_sheet


def gradient(t, height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([(x * 2) % 256, (y * 2) % 256, np.full_like(x, 10 * t)], -1).astype(np.uint8)


@pytest.mark.parametrize("height, width", [(48, 64), (47, 63), (1, 1)])
def test_video_is_of_the_kind_that_browsers_play_and_shows_the_frames(tmp_path, height, width):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, fps=12.5) as writer:
        for t in range(7):
            writer.write(gradient(t, height, width))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index must come before the frames"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 12.5
    assert len(frames) == 7
    assert frames[0].shape == (height + height % 2, width + width % 2, 3)
    if height > 1:
        difference = np.abs(frames[3][:height, :width].astype(int) - gradient(3, height, width))
        assert difference.mean() < 8


def test_frames_of_another_size_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="shape of the first one"),
        VideoWriter(tmp_path / "a.mp4", 10) as writer,
    ):
        writer.write(gradient(0, 32, 32))
        writer.write(gradient(0, 32, 48))


def test_zero_fps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fps must be positive"):
        VideoWriter(tmp_path / "a.mp4", 0)
    assert not (tmp_path / "a.mp4").exists()


def test_sheet_places_every_picture_in_its_cell():
    colors = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)]]
    rows = [[np.full((30, 40, 3), color, np.uint8) for color in row] for row in colors]
    sheet = np.asarray(
        contact_sheet(
            rows, columns=["image", "objects"], row_titles=["0.0 s", "1.0 s"], title="clip", cell_width=100
        )
    )
    centers = {color: np.argwhere((sheet == color).all(-1)).mean(0) for row in colors for color in row}
    for row in colors:
        assert centers[row[0]][0] == centers[row[1]][0] and centers[row[0]][1] < centers[row[1]][1]
    assert centers[colors[0][0]][0] < centers[colors[1][0]][0]
    assert all((sheet == color).all(-1).sum() == 100 * 75 for row in colors for color in row)


def test_sheet_refuses_missing_titles():
    with pytest.raises(ValueError, match="must match"):
        contact_sheet([[np.zeros((4, 4, 3), np.uint8)]], columns=["a", "b"], row_titles=["0"], title="x")
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([], columns=[], row_titles=[], title="x")
