"""The layouts of the data sets that unsupervised video object segmentation is judged on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from objslot.data.annotated import ArraySequence, MaskFileSequence, Sequence
from objslot.data.frame_folder import FrameFolder
from objslot.data.masks import mask_files
from objslot.data.video import natural_key
from objslot.errors import UserError

__all__ = ["ArraySequence", "MaskFileSequence", "Sequence", "open_sequences"]


def open_sequences(
    dataset: str, root: str | Path, subset: str | Iterable[str] | None = None
) -> list[Sequence]:
    """Open the annotated sequences of a data set; only file names and image headers are read.

    Layouts under ``root``:

    * ``davis2016``: ``JPEGImages/480p/<name>/*.jpg``, ``Annotations/480p/<name>/*.png``,
      ``ImageSets/480p/<subset>.txt`` (a line is a name, or the paths of a frame and its mask). Objects are
      merged.
    * ``davis2017``: the same with ``ImageSets/2017/<subset>.txt``; indexed masks, 255 is void, from
      ``Annotations_unsupervised`` where that exists.
    * ``davis2017-semi``: the same with the masks of ``Annotations``, for the semi-supervised task.
    * ``segtrack2``: ``JPEGImages/<name>/*``, ``GroundTruth/<name>/*`` or one folder an object,
      ``GroundTruth/<name>/<object>/*``. Objects are merged.
    * ``fbms``: ``Testset/<name>/*.jpg`` (or ``<name>/*.jpg``) and ``Testset/<name>/GroundTruth/*``: masks for
      some frames, grey levels on black or, in ``.ppm`` files, colours on white. Objects are merged.
    * ``folder``: ``<name>/frames/*`` and ``<name>/masks/*``, or the parallel folders ``frames/<name>/*`` and
      ``masks/<name>/*``; a mask has the name of its frame. Indexed or grey masks, 255 is void where a
      sequence has other objects.

    Args:
        dataset: one of the names above.
        root: the data set's folder.
        subset: the name of a list in ``ImageSets``, a file with a name a line, or sequence names (separated
            by commas if one string). Default: ``val`` where there is such a list, else the only list, else
            every sequence. Sequences of a list that are not on disk are left out with a warning; names given
            here must be there.

    Returns:
        The sequences in the order of the list, or in natural order of their names.

    Raises:
        UserError: an unknown data set or sequence, a missing folder, masks that do not match the frames in
            number, name or size. The message names the folder and what was expected.
    """
    if dataset not in LAYOUTS:
        raise UserError(f"dataset: got {dataset!r}, expected one of {', '.join(LAYOUTS)}")
    root = Path(root).expanduser()
    # Both tasks of a data set lie in the same folders, and messages are about these.
    kept_as = dataset.removesuffix("-semi")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected the root of {kept_as}")
    layout = LAYOUTS[dataset]
    on_disk = layout.names(root)
    names = _choose(kept_as, root, layout.lists, subset, on_disk)
    return [layout.open(root, name) for name in names]


class _Layout:
    """Where a data set keeps things: ``names`` lists the sequences on disk, ``open`` opens one of them."""

    def __init__(
        self,
        names: Callable[[Path], list[str]],
        open: Callable[[Path, str], Sequence],
        lists: str | None = None,
    ):
        self.names = names
        self.open = open
        self.lists = lists


def _choose(
    dataset: str, root: Path, lists: str | None, subset: str | Iterable[str] | None, on_disk: list[str]
) -> list[str]:
    known = {path.stem: path for path in sorted((root / lists).glob("*.txt"))} if lists else {}
    if subset is None:
        subset = "val" if "val" in known else next(iter(known)) if len(known) == 1 else on_disk
    if isinstance(subset, str) and (subset in known or _is_file(subset)):
        path = known.get(subset, Path(subset))
        names = list(dict.fromkeys(_name_of(line) for line in path.read_text().splitlines() if line.strip()))
        missing = [name for name in names if name not in on_disk]
        if len(missing) == len(names):
            raise UserError(f"{path}: none of its {len(names)} sequences is under {root}")
        if missing:
            warnings.warn(
                f"{dataset}: {len(missing)} of the {len(names)} sequences of {path.name} are not on disk "
                f"and are left out: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}",
                stacklevel=3,
            )
        return [name for name in names if name in on_disk]
    names = [name.strip() for name in subset.split(",")] if isinstance(subset, str) else list(subset)
    for name in names:
        if name not in on_disk:
            lists_found = f"; lists: {', '.join(known)}" if known else ""
            raise UserError(f"sequences: {dataset} has no sequence or list {name!r} under {root}{lists_found}")
    if not names:
        raise UserError(f"{root}: holds no sequence in the layout of {dataset}")
    return names


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:
        # Many names in a row are longer than a path may be.
        return False


def _name_of(line: str) -> str:
    """A sequence's name from a line of a list: a plain name, or a frame's path with or without its mask's."""
    first = line.split()[0]
    return Path(first).parent.name if "/" in first else first


def _folders(folder: Path, *, holding: str | None = None) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = (p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return sorted(
        (name for name in found if not holding or (folder / name / holding).is_dir()), key=natural_key
    )


def _require_masks(folder: Path) -> list[Path]:
    masks = mask_files(folder) if folder.is_dir() else []
    if not masks:
        raise UserError(f"{folder}: holds no mask image")
    return masks


def _match(video: FrameFolder, masks: list[Path], folder: Path) -> dict[int, tuple[Path, ...]]:
    """One mask for every frame, by name without suffix."""
    by_stem = {path.stem: path for path in masks}
    if len(masks) != video.n_frames:
        raise UserError(f"{folder}: {len(masks)} masks for the {video.n_frames} frames of {video.path}")
    for frame in video.files:
        if frame.stem not in by_stem:
            raise UserError(
                f"{folder}: no mask named like frame {frame.name}; it holds {masks[0].name} and others"
            )
    return {i: (by_stem[frame.stem],) for i, frame in enumerate(video.files)}


def _davis_annotations(root: Path, unsupervised: bool) -> Path:
    proposals = root / "Annotations_unsupervised" / "480p"
    return proposals if unsupervised and proposals.is_dir() else root / "Annotations" / "480p"


def _davis(
    lists: str, *, merge_objects: bool = False, unsupervised: bool = False, first_frame_given: bool = False
) -> _Layout:
    def names(root: Path) -> list[str]:
        frames = set(_folders(root / "JPEGImages" / "480p"))
        return [name for name in _folders(_davis_annotations(root, unsupervised)) if name in frames]

    def open_one(root: Path, name: str) -> Sequence:
        video = FrameFolder(root / "JPEGImages" / "480p" / name)
        folder = _davis_annotations(root, unsupervised) / name
        masks = _match(video, _require_masks(folder), folder)
        return MaskFileSequence(
            name,
            video,
            masks,
            merge_objects=merge_objects,
            first_frame_objects=not merge_objects,
            first_frame_given=first_frame_given,
        )

    return _Layout(names, open_one, lists)


def _open_segtrack(root: Path, name: str) -> Sequence:
    video = FrameFolder(root / "JPEGImages" / name)
    folder = root / "GroundTruth" / name
    objects = [folder / entry for entry in _folders(folder)] or [folder]
    matched = [_match_in_order(video, _require_masks(entry), entry) for entry in objects]
    masks = {i: tuple(entry[i][0] for entry in matched) for i in range(video.n_frames)}
    return MaskFileSequence(name, video, masks, merge_objects=True)


def _match_in_order(video: FrameFolder, masks: list[Path], folder: Path) -> dict[int, tuple[Path, ...]]:
    # SegTrack-v2 names some masks unlike their frames: then the order of the names decides.
    if len(masks) == video.n_frames and not {m.stem for m in masks} & {f.stem for f in video.files}:
        return {i: (path,) for i, path in enumerate(masks)}
    return _match(video, masks, folder)


def _fbms_root(root: Path) -> Path:
    return root / "Testset" if (root / "Testset").is_dir() else root


def _open_fbms(root: Path, name: str) -> Sequence:
    video = FrameFolder(_fbms_root(root) / name)
    folder = video.path / "GroundTruth"
    masks = [path for path in _require_masks(folder) if "PROB" not in path.stem]
    colours = [path for path in masks if path.suffix.lower() == ".ppm"]
    masks = colours or masks
    position = {frame.stem: i for i, frame in enumerate(video.files)}
    matched: dict[int, tuple[Path, ...]] = {}
    for path in masks:
        stem = path.stem.removesuffix("_gt")
        if stem not in position:
            raise UserError(f"{path}: no frame {stem} in {video.path}")
        matched[position[stem]] = (path,)
    background = 0xFFFFFF if colours else 0
    return MaskFileSequence(name, video, matched, background=background, merge_objects=True)


def _parallel(root: Path) -> bool:
    return (root / "frames").is_dir() and (root / "masks").is_dir()


def _folder_names(root: Path) -> list[str]:
    if _parallel(root):
        with_masks = set(_folders(root / "masks"))
        return [name for name in _folders(root / "frames") if name in with_masks]
    return [name for name in _folders(root, holding="frames") if (root / name / "masks").is_dir()]


def _open_folder(root: Path, name: str) -> Sequence:
    frames, masks = (
        ("frames/" + name, "masks/" + name) if _parallel(root) else (name + "/frames", name + "/masks")
    )
    video = FrameFolder(root / frames, name)
    return MaskFileSequence(name, video, _match(video, _require_masks(root / masks), root / masks))


LAYOUTS = {
    "davis2016": _davis("ImageSets/480p", merge_objects=True),
    "davis2017": _davis("ImageSets/2017", unsupervised=True),
    "davis2017-semi": _davis("ImageSets/2017", first_frame_given=True),
    "segtrack2": _Layout(lambda root: _folders(root / "GroundTruth"), _open_segtrack),
    "fbms": _Layout(lambda root: _folders(_fbms_root(root), holding="GroundTruth"), _open_fbms),
    "folder": _Layout(_folder_names, _open_folder),
}
