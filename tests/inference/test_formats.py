"""`discover` on the kinds and sizes of video that people have."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from objslot.cli import main

CODECS = {
    "clip.webm": ("libvpx-vp9", "yuv420p"),
    "clip.mov": ("libx264", "yuv444p"),
    "clip.gif": ("gif", "rgb8"),
    "clip.mp4": ("libx264", "yuv420p"),
}


def encode(path, codec, pixels, size, n_frames):
    height, width = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        for t in range(n_frames):
            frame = np.full((height, width, 3), 60, np.uint8)
            frame[height // 4 : height // 2, (width // 8) * (t % 4) :][:, : width // 4] = (250, 220, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "size", "n_frames"),
    [
        ("clip.webm", (48, 64), 10),
        ("clip.mov", (45, 61), 5),
        ("clip.gif", (33, 47), 6),
        ("clip.mp4", (16, 240), 1),
        ("clip.mp4", (240, 16), 3),
        ("clip.mp4", (6, 10), 2),
    ],
)
def test_discover_takes_it(model, tmp_path, name, size, n_frames):
    model.save(tmp_path / "model")
    encode(tmp_path / name, *CODECS[name], size, n_frames)
    arguments = [tmp_path / name, "--model", tmp_path / "model", "--out", tmp_path / "out"]
    assert main(["discover", *map(str, arguments)]) == 0
    (found,) = (tmp_path / "out").iterdir()
    summary = json.loads((found / "objects.json").read_text())
    assert (summary["frames"], summary["height"], summary["width"]) == (n_frames, *size)
    masks = [np.asarray(Image.open(path)) for path in sorted((found / "masks").iterdir())]
    assert len(masks) == n_frames and all(mask.shape == size for mask in masks)
    with av.open(str(found / "overlay.mp4")) as container:
        shapes = {(frame.height, frame.width) for frame in container.decode(video=0)}
    assert shapes == {(size[0] + size[0] % 2, size[1] + size[1] % 2)}
    for track in summary["objects"]:
        assert track["areas"] == [int((mask == track["id"]).sum()) for mask in masks if (mask == track["id"]).any()]
        rows, columns = np.nonzero(masks[track["first_frame"]] == track["id"])
        assert track["boxes"][0] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
