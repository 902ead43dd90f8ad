import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from objslot.data.segmentation import VideoSegmentation
from objslot.errors import UserError
from objslot.inference.display import DisplayMaps
from objslot.inference.writer import output_folders, write_segmentation
from objslot.viz.folders import safe_name


class Clip:
    """A square that moves right by 4 pixels a frame, over noise."""

    def __init__(self, n_frames=5, size=(48, 64), name="clip"):
        self.name, self.n_frames, self.size, self.fps = name, n_frames, size, 10.0

    def frames(self, start=0):
        for t in range(start, self.n_frames):
            pixels = np.random.default_rng(t).integers(0, 255, (*self.size, 3), dtype=np.uint8)
            yield torch.from_numpy(pixels)

    def segmentation(self, **others):
        tracks = np.zeros((self.n_frames, *self.size), np.uint8)
        for t in range(1, self.n_frames):
            tracks[t, 8:20, 4 * t : 4 * t + 12] = 7
        return VideoSegmentation(self.name, tracks, foreground=(9, 7), scores={7: 0.75}, **others)


def test_the_folder_holds_what_was_segmented(tmp_path):
    clip = Clip()
    partition = np.random.default_rng(0).integers(1, 255, (5, 48, 64), dtype=np.uint8)
    segmentation = clip.segmentation(partition=partition)
    done = []
    folder = tmp_path / "out" / "clip"
    written = write_segmentation(
        clip,
        segmentation,
        folder,
        settings={"instances": 4},
        progress=lambda *a: done.append(a),
    )
    assert written == json.loads((folder / "objects.json").read_text())
    assert sorted(p.name for p in folder.iterdir()) == [
        "masks",
        "objects.json",
        "overlay.mp4",
        "report.html",
        "sheet.png",
        "slots",
    ]
    for t in range(5):
        assert np.array_equal(
            np.asarray(Image.open(folder / "masks" / f"{t:05d}.png")), segmentation.tracks[t]
        )
        assert np.array_equal(np.asarray(Image.open(folder / "slots" / f"{t:05d}.png")), partition[t])
    with av.open(str(folder / "overlay.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
    assert done[-1] == (5, 5)
    assert list((tmp_path / "out").iterdir()) == [folder]


def test_objects_json_describes_the_tracks(tmp_path):
    clip = Clip()
    summary = write_segmentation(clip, clip.segmentation(), tmp_path / "clip", settings={"instances": 4})
    (track,) = summary.pop("objects")
    assert summary == {
        "name": "clip",
        "frames": 5,
        "width": 64,
        "height": 48,
        "fps": 10.0,
        "foreground": [7],
        "settings": {"instances": 4},
    }
    assert track == {
        "id": 7,
        "score": 0.75,
        "foreground": True,
        "first_frame": 1,
        "last_frame": 4,
        "frames": [1, 2, 3, 4],
        "boxes": [[4 * t, 8, 4 * t + 12, 20] for t in (1, 2, 3, 4)],
        "areas": [144] * 4,
    }


def test_maps_of_the_token_grid_are_shown_on_the_sheet(tmp_path):
    clip = Clip()
    maps = DisplayMaps(lambda t: np.full((3, 4), t + 1, np.uint8), {2: np.zeros((3, 2, 3, 4), np.uint8)})
    write_segmentation(clip, clip.segmentation(), tmp_path / "a", maps=maps)
    write_segmentation(clip, clip.segmentation(), tmp_path / "b")
    assert Image.open(tmp_path / "a" / "sheet.png").width > Image.open(tmp_path / "b" / "sheet.png").width


def test_a_folder_that_holds_something_is_refused_and_untouched(tmp_path):
    clip = Clip()
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="already exists and is not empty"):
        write_segmentation(clip, clip.segmentation(), tmp_path / "clip")
    assert [p.name for p in tmp_path.rglob("*")] == ["clip", "mine.txt"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "clip").mkdir()
    clip = Clip()
    write_segmentation(clip, clip.segmentation(), tmp_path / "clip")
    assert (tmp_path / "clip" / "objects.json").is_file()


@pytest.mark.parametrize("frames, message", [(4, "has 4 readable frames"), (6, "has more frames than the 5")])
def test_a_video_of_another_length_leaves_nothing_behind(tmp_path, frames, message):
    with pytest.raises(UserError, match=message):
        write_segmentation(Clip(n_frames=frames), Clip().segmentation(), tmp_path / "clip")
    assert list(tmp_path.iterdir()) == []


def test_a_break_leaves_nothing_behind(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_segmentation(Clip(), Clip().segmentation(), tmp_path / "clip", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, expected",
    [
        ("../../etc/passwd", "etc_passwd"),
        ("..", "video"),
        ("", "video"),
        ("a clip (2).mp4", "a_clip_2_.mp4"),
        ("/absolute/path", "absolute_path"),
        (".hidden", "hidden"),
        ("été", "été"),
        ("a\0b\nc", "a_b_c"),
    ],
)
def test_names_never_leave_the_output_folder(tmp_path, name, expected):
    assert safe_name(name) == expected
    assert output_folders(tmp_path, [name]) == [tmp_path / expected]


def test_equal_names_get_different_folders(tmp_path):
    folders = output_folders(tmp_path, ["clip", "x/clip", "clip", "Clip"])
    assert [folder.name for folder in folders] == ["clip", "x_clip", "clip-2", "Clip-3"]


def test_all_output_folders_are_checked_before_any_work(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "kept").touch()
    with pytest.raises(UserError, match="b already exists"):
        output_folders(tmp_path, ["a", "b"])
