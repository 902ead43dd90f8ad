"""Reading videos: the right frame after every seek, layouts found by looking, clear errors for bad files."""

import os
import pickle
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from objslot.data import FrameFolder, VideoFile, find_videos
from objslot.errors import UserError

HEIGHT, WIDTH = 48, 64


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Brightness counts the frames; the red corner tells which way is up."""
    pixels = np.full((height, width, 3), 8 * number % 256, np.uint8)
    pixels[:16, :24] = (255, 0, 0)
    return pixels


def encode(
    path, n_frames=30, *, codec="libx264", pixel_format="yuv420p", times=None, container=None, **options
):
    with av.open(str(path), "w", options=container or {}) as output:
        if codec == "libx264":
            options.setdefault("x264-params", "scenecut=0")
        stream = output.add_stream(codec, rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
        stream.codec_context.time_base = Fraction(1, 24)
        for number in range(n_frames):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24").reformat(format=pixel_format)
            frame.pts = times[number] if times else number
            frame.time_base = Fraction(1, 24)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def write_frames(folder, n_frames=5, suffix=".png", height=HEIGHT, width=WIDTH):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n_frames):
        Image.fromarray(picture(number, height, width)).save(folder / f"{number}{suffix}")
    return folder


def message(call) -> str:
    """The one line of the error."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


FILES = {
    "a.mp4": {"g": "10", "bf": "2"},
    "open_gop.mp4": {"g": "10", "bf": "3", "x264-params": "scenecut=0:open-gop=1"},
    "variable.mp4": {"g": "10", "bf": "2", "times": [n + 3 * (n // 4) + (n > 10) * 17 for n in range(30)]},
    "a.webm": {"codec": "libvpx-vp9", "g": "10"},
    "a.mov": {"g": "10"},
    "a.mkv": {"g": "10"},
    "a.avi": {"codec": "mpeg4", "g": "10", "bf": "2", "b": "4000000"},
    "a.ts": {"g": "10", "bf": "2"},
    "a.gif": {"codec": "gif", "pixel_format": "rgb8"},
}


@pytest.mark.parametrize("name", FILES)
def test_frames_of_a_file(tmp_path, name):
    video = VideoFile(encode(tmp_path / name, **FILES[name]))
    frames = torch.stack(list(video.frames()))
    assert (video.n_frames, video.size) == (30, (HEIGHT, WIDTH))
    assert frames.shape == (30, HEIGHT, WIDTH, 3)
    assert frames.dtype == torch.uint8
    if name != "a.gif":  # rgb8 has 8 levels
        brightness = frames[:, 40:, 40:].float().mean(dim=(1, 2, 3))
        torch.testing.assert_close(brightness, torch.arange(30.0) * 8, atol=3.5, rtol=0)
    for positions in ([29, 3, 3, 17], [0], [11, 12, 25], [9, 10, 19, 20, 29], [28, 1], []):
        assert torch.equal(video.read(positions), frames[positions])
    for start in (1, 9, 10, 23, 29):
        assert torch.equal(torch.stack(list(video.frames(start))), frames[start:])
    assert list(video.frames(30)) == []
    assert video.fps > 1


def test_seeking_decodes_from_a_near_key_frame(tmp_path, monkeypatch):
    video = VideoFile(encode(tmp_path / "a.mp4", g="10", bf="0"))
    assert video.size
    converted = []
    original = VideoFile._numbered

    def counting(self, container, key):
        for item in original(self, container, key):
            converted.append(item[0])
            yield item

    monkeypatch.setattr(VideoFile, "_numbered", counting)
    video.read([25])
    assert converted[0] == 20
    assert converted[-1] == 25


@pytest.mark.parametrize(
    ("turn", "matrix"), [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))]
)
def test_rotation_metadata(tmp_path, turn, matrix):
    """A phone's portrait video: the matrix in the track header turns the frames clockwise by `turn`."""
    path = encode(tmp_path / "a.mp4", n_frames=3)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    fields = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    content[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in fields)
    path.write_bytes(content)
    video = VideoFile(path)
    upright = np.rot90(picture(0), -turn // 90)
    assert video.size == upright.shape[:2]
    frame = video.read([0])[0].numpy().astype(int)
    assert abs(frame - upright).mean() < 12


def test_a_video_travels_to_another_process(tmp_path):
    video = VideoFile(encode(tmp_path / "a.mp4", g="10"))
    frames = video.read([3, 22])
    assert torch.equal(pickle.loads(pickle.dumps(video)).read([3, 22]), frames)


def test_no_file_stays_open(tmp_path):
    video = VideoFile(encode(tmp_path / "a.mp4", g="10"))
    before = len(os.listdir("/proc/self/fd"))
    video.read([3, 22])
    half_read = video.frames()
    next(half_read)
    half_read.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".JPEG"])
def test_frame_folder(tmp_path, suffix):
    folder = write_frames(tmp_path / "clip", 12, suffix)
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    video = FrameFolder(folder)
    assert (video.name, video.n_frames, video.size) == ("clip", 12, (HEIGHT, WIDTH))
    brightness = video.read([2, 10, 2])[:, 40, 40, 0].float()
    torch.testing.assert_close(brightness, torch.tensor([16.0, 80.0, 16.0]), atol=3, rtol=0)
    assert [int(frame[40, 40, 0] + 4) // 8 for frame in video.frames(9)] == [9, 10, 11]


def test_gray_and_palette_frames_become_rgb(tmp_path):
    Image.fromarray(picture(3)).convert("L").save(tmp_path / "0.png")
    Image.fromarray(picture(3)).convert("P").save(tmp_path / "1.png")
    assert FrameFolder(tmp_path).read([0, 1]).shape == (2, HEIGHT, WIDTH, 3)


def test_reading_outside_a_video(tmp_path):
    for video in (FrameFolder(write_frames(tmp_path / "a")), VideoFile(encode(tmp_path / "b.mp4", 5))):
        for position in (5, -1):
            assert f"no frame {position}" in message(lambda v=video, p=position: v.read([0, p]))


def test_identity_changes_with_the_file(tmp_path):
    file, folder = VideoFile(encode(tmp_path / "b.mp4", 5)), FrameFolder(write_frames(tmp_path / "a"))
    before = file.identity(), folder.identity()
    assert before == (VideoFile(file.path).identity(), FrameFolder(folder.path).identity())
    os.utime(file.path, ns=(1, 1))
    os.utime(folder.files[3], ns=(1, 1))
    assert file.identity() != before[0]
    assert folder.identity() != before[1]


def names(path, **options):
    return [video.name for video in find_videos(path, **options)]


def test_layouts(tmp_path):
    encode(tmp_path / "videos/a.mp4".replace("/", "_"), 2).rename(_made(tmp_path / "videos") / "v10.mp4")
    encode(tmp_path / "videos" / "v9.mp4", 2)
    (tmp_path / "videos" / "thumbnail.jpg").write_bytes(b"x")
    (tmp_path / "videos" / ".v1.mp4").write_bytes(b"x")
    (tmp_path / "videos" / "gone.mp4").symlink_to(tmp_path / "nowhere")
    assert names(tmp_path / "videos") == ["v9", "v10"]
    assert names(tmp_path / "videos" / "v9.mp4") == ["v9"]

    write_frames(tmp_path / "folders" / "dog")
    write_frames(tmp_path / "folders" / "cat")
    (tmp_path / "folders" / "dog" / "masks").mkdir()
    write_frames(tmp_path / "folders" / "dog" / "masks")
    (tmp_path / "folders" / "loop").symlink_to(tmp_path / "folders")
    assert names(tmp_path / "folders") == ["cat", "dog"]
    assert names(tmp_path / "folders" / "cat") == ["cat"]

    for resolution in ("480p", "Full-Resolution"):
        write_frames(
            tmp_path / "davis" / "JPEGImages" / resolution / "bear", 3 if resolution == "480p" else 2
        )
        write_frames(tmp_path / "davis" / "Annotations" / resolution / "bear")
    assert names(tmp_path / "davis") == ["bear"]
    assert find_videos(tmp_path / "davis")[0].n_frames == 3

    write_frames(tmp_path / "full" / "JPEGImages" / "Full-Resolution" / "bear")
    assert names(tmp_path / "full") == ["bear"]

    write_frames(tmp_path / "ytvos" / "train" / "JPEGImages" / "0a7b27fde9")
    write_frames(tmp_path / "ytvos" / "valid" / "JPEGImages" / "1a7b27fde9")
    assert names(tmp_path / "ytvos") == ["0a7b27fde9"]


def _made(folder):
    folder.mkdir()
    return folder


def test_names_are_unique_and_hold_no_separator(tmp_path):
    encode(tmp_path / "a.mp4", 2)
    encode(tmp_path / "a.mov", 2)
    encode(_made(tmp_path / "deep") / "a.mp4", 2)
    write_frames(tmp_path / "deep" / "dog")
    assert names(tmp_path) == ["a.mov", "a.mp4", "deep__a", "deep__dog"]
    assert names(tmp_path / "deep" / "dog") == ["dog"]


def test_bad_input_is_one_clear_error(tmp_path):
    assert "no such file or folder" in message(lambda: find_videos(tmp_path / "nowhere"))
    assert "no video found" in message(lambda: find_videos(_made(tmp_path / "empty")))
    (tmp_path / "empty" / "notes.txt").write_text("x")
    assert "no video found" in message(lambda: find_videos(tmp_path / "empty"))

    image = write_frames(tmp_path / "frames") / "0.png"
    assert "an image" in message(lambda: find_videos(image))

    (tmp_path / "zero.mp4").touch()
    assert "0 bytes" in message(lambda: find_videos(tmp_path / "zero.mp4"))
    (tmp_path / "text.mp4").write_text("no video")
    assert "text.mp4: cannot be read" in message(lambda: find_videos(tmp_path / "text.mp4"))

    image.write_bytes(image.read_bytes()[:20])
    assert "0.png: cannot be read" in message(lambda: find_videos(tmp_path / "frames"))
    Image.fromarray(picture(0, 20, 30)).save(image)
    assert "must have one size" in message(lambda: find_videos(tmp_path / "frames"))
    assert "must have one size" in message(lambda: FrameFolder(tmp_path / "frames").read([0, 1]))


@pytest.mark.parametrize("flags", [{}, {"movflags": "faststart"}], ids=["index last", "index first"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_file(tmp_path, flags, share):
    path = encode(tmp_path / "a.mp4", container=flags)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert str(path) in message(lambda: find_videos(path))


def test_a_file_that_shrinks_or_goes_after_it_was_indexed(tmp_path):
    video = VideoFile(encode(tmp_path / "a.mp4", container={"movflags": "faststart"}, g="5"))
    assert video.n_frames == 30
    video.path.write_bytes(video.path.read_bytes()[:-400])
    assert "a.mp4" in message(lambda: video.read([29]))
    video.path.unlink()
    assert "disappeared" in message(lambda: video.read([0]))


def test_bad_videos_among_good_ones(tmp_path):
    encode(tmp_path / "good.mp4", 3)
    (tmp_path / "bad.mp4").write_text("no video")
    (tmp_path / "zero.mp4").touch()
    assert "cannot be read" in message(lambda: find_videos(tmp_path))
    unusable = []
    assert names(tmp_path, unusable=unusable) == ["good"]
    assert sorted(str(error).split(":")[0].rsplit("/")[-1] for error in unusable) == ["bad.mp4", "zero.mp4"]
    (tmp_path / "good.mp4").unlink()
    assert "and 1 more" in message(lambda: find_videos(tmp_path, unusable=[]))
