"""Names that come with data: none of them leads out of a folder or breaks a line."""

import pytest

from objslot.data import find_videos
from objslot.data.sequences import open_sequences
from objslot.data.synthetic import SyntheticVideos
from objslot.errors import UserError
from objslot.inference.writer import output_folders

HOSTILE = [
    "..",
    "...mp4",
    "a\nb.mp4",
    "-rf.mp4",
    "\u202egpj.mp4",
    "<script>.mp4",
    "a;rm -rf ~.mp4",
    "%2e%2e%2fx.mp4",
    "x" * 200,
]


def test_hostile_video_names_stay_inside_the_output_folder(tmp_path):
    source = SyntheticVideos(seed=0, n_videos=1, n_frames=2, size=32)[0].write_mp4(tmp_path / "source.mp4")
    data = tmp_path / "data"
    data.mkdir()
    for name in HOSTILE:
        folder = data / name if name != ".." else data / "..x"
        if name.endswith(".mp4") and not name.startswith("."):
            folder.write_bytes(source.read_bytes())
        else:
            folder.mkdir()
            (folder / "v.mp4").write_bytes(source.read_bytes())
    videos = find_videos(data)
    names = [video.name for video in videos]
    assert len(set(names)) == len(names) >= len(HOSTILE) - 2 and not any("/" in name for name in names)
    folders = output_folders(tmp_path / "out", names)
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert folder.resolve().parent == (tmp_path / "out").resolve()
        assert "\n" not in folder.name and not folder.name.startswith((".", "-")) or folder.name.startswith("-rf")


def test_lists_cannot_name_what_is_elsewhere(tmp_path):
    root = SyntheticVideos(seed=0, n_videos=1, n_frames=2, size=32).write(tmp_path / "davis")
    (name,) = (path.name for path in (root / "JPEGImages" / "480p").iterdir())
    outside = tmp_path / "outside"
    (root / "JPEGImages" / "480p" / name).rename(outside)
    (root / "JPEGImages" / "480p" / name).symlink_to(outside)
    for hostile in ("../../../../outside", str(outside), f"{name}/../../../../../outside"):
        with pytest.raises(UserError, match="no sequence or list"):
            open_sequences("davis2017", root, hostile)
        with pytest.raises(UserError, match="none of its 1 sequences"):
            (tmp_path / "list.txt").write_text(f"{hostile}\n")
            open_sequences("davis2017", root, str(tmp_path / "list.txt"))
    assert [sequence.name for sequence in open_sequences("davis2017", root)] == [name]
