"""Find the videos under a path by looking at it."""

from collections.abc import Iterator
from pathlib import Path

from objslot.data.frame_folder import IMAGE_SUFFIXES, FrameFolder, is_image
from objslot.data.video import Video, natural_key, readable
from objslot.data.video_file import VideoFile, is_video
from objslot.errors import UserError


def find_videos(
    path: str | Path, *, check: bool = True, unusable: list[UserError] | None = None
) -> list[Video]:
    """The videos under ``path``, found by looking, in natural order of their names.

    ``path`` is a video file, a folder of frames, a DAVIS root (``JPEGImages/480p`` or another resolution), a
    YouTube-VOS root (``train/JPEGImages``), or a folder that holds video files and folders of frames at any
    depth. Image files beside video files are taken for thumbnails. With ``check`` every video is indexed and
    every image header read; a video that fails raises, or, where a list ``unusable`` is given, is left out
    and its error appended.

    Raises `UserError` if ``path`` does not exist or holds no usable video.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix.lower() in IMAGE_SUFFIXES:
            raise UserError(f"{path}: an image, expected a video file or a folder")
        candidates = [(path, path.name)]
    elif path.is_dir():
        root = _layout_root(path)
        found = list(_search(root, ancestors=()))
        candidates = [
            (item, item.relative_to(root).as_posix() if item != root else path.name) for item in found
        ]
    else:
        raise UserError(f"{path}: no such file or folder")

    videos, failures = [], []
    for (item, _), name in zip(candidates, _unique_names(candidates), strict=True):
        try:
            video = FrameFolder(item, name) if item.is_dir() else VideoFile(item, name)
            if check:
                video.check()
            videos.append(video)
        except UserError as error:
            if unusable is None:
                raise
            failures.append(error)
    if unusable is not None:
        unusable += failures
    if not videos:
        if failures:
            more = f" (and {len(failures) - 1} more unusable videos)" if len(failures) > 1 else ""
            raise UserError(f"{failures[0]}{more}")
        raise UserError(
            f"{path}: no video found: no video file, no folder of images, no DAVIS or YouTube-VOS layout"
        )
    return sorted(videos, key=lambda video: natural_key(video.name))


def _layout_root(path: Path) -> Path:
    """The folder of videos inside a DAVIS or YouTube-VOS root; ``path`` itself for any other folder."""
    for images in (
        path / "JPEGImages",
        path / "train" / "JPEGImages",
        path / "train_all_frames" / "JPEGImages",
    ):
        if images.is_dir():
            for resolution in ("480p", "Full-Resolution", "1080p"):
                if (images / resolution).is_dir():
                    return images / resolution
            return images
    return path


def _search(folder: Path, ancestors: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in ancestors:
        return
    with readable(folder):
        entries = sorted(
            (p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: natural_key(p.name)
        )
    files = [entry for entry in entries if is_video(entry)]
    if files:
        yield from files
    elif any(is_image(entry) for entry in entries):
        yield folder
        return
    for entry in entries:
        if entry.is_dir():
            yield from _search(entry, (*ancestors, real))


def _unique_names(candidates: list[tuple[Path, str]]) -> list[str]:
    """Folder names without separators; the file suffix stays only where two videos would share a name."""
    short = [name if item.is_dir() else str(Path(name).with_suffix("")) for item, name in candidates]
    return [
        (full if short.count(brief) > 1 else brief).replace("/", "__")
        for (_, full), brief in zip(candidates, short, strict=True)
    ]
