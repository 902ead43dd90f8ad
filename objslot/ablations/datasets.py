"""The data sets under a folder, found by looking: DAVIS-2016 and DAVIS-2017."""

from __future__ import annotations

from pathlib import Path

from objslot.data import Video, find_videos
from objslot.data.video import readable
from objslot.errors import UserError

_LISTS = {"davis2016": "480p", "davis2017": "2017"}


def find_data_sets(root: str | Path) -> dict[str, Path]:
    """The root of each data set by its name, in `root` itself and in the folders right under it.

    A DAVIS folder (JPEGImages/480p, Annotations/480p) is DAVIS-2016 where it has ImageSets/480p, DAVIS-2017 where it
    has ImageSets/2017, and may be both; without lists, DAVIS-2016 where its name says so and else DAVIS-2017.

    Raises `UserError` when there is none.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a DAVIS data set, or a folder of them")
    with readable(root):
        candidates = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
    found: dict[str, Path] = {}
    for folder in candidates:
        for name in _names(folder):
            found.setdefault(name, folder)
    if not found:
        raise UserError(
            f"{root}: holds no DAVIS data set; expected JPEGImages/480p and Annotations/480p in it or in a folder "
            "right under it"
        )
    return dict(sorted(found.items()))


def _names(folder: Path) -> list[str]:
    annotations = (folder / "Annotations" / "480p", folder / "Annotations_unsupervised" / "480p")
    if not (folder / "JPEGImages" / "480p").is_dir() or not any(map(Path.is_dir, annotations)):
        return []
    listed = [name for name, lists in _LISTS.items() if (folder / "ImageSets" / lists).is_dir()]
    return listed or ["davis2016" if "2016" in folder.name else "davis2017"]


def training_videos(data_sets: dict[str, Path]) -> list[Video]:
    """The videos of all data sets, without their annotations; those of one name are one video."""
    videos: dict[str, Video] = {}
    for folder in dict.fromkeys(data_sets.values()):
        for video in find_videos(folder):
            videos.setdefault(video.name, video)
    return list(videos.values())
