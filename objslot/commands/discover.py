"""`objslot discover`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from objslot.commands._common import Command, load_model, option, progress, say
from objslot.errors import UserError

ATTENTION_FRAMES = 16


@dataclasses.dataclass(kw_only=True)
class Discover(Command):
    """Find the objects in videos with a trained model; write masks, a video and a page to look at."""

    videos: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        option("Video files, folders of frames, or folders that hold them.", "VIDEO"),
    ]
    model: Annotated[Path, option("Folder that `objslot train` wrote.", "DIR")]
    out: Annotated[Path, option("Where to write; one folder a video.", "DIR")]
    instances: Annotated[
        int | None, option("Instances of each semantics; any number.", "P", "as in training")
    ] = None
    iterations: Annotated[int | None, option("Slot attention iterations.", "I", "as in training")] = None

    def run(self) -> None:
        for name in ("instances", "iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")
        if not self.videos:
            raise UserError("name at least one VIDEO: a video file or a folder of frames")
        from objslot.data import find_videos
        from objslot.inference.writer import output_folders

        videos = [video for path in self.videos for video in find_videos(path)]
        folders = output_folders(self.out, [video.name for video in videos])
        model = load_model(self.model)
        settings = {"model": str(self.model), "instances": self.instances, "iterations": self.iterations}
        for video, folder in zip(videos, folders, strict=True):
            self._write_one(model, video, folder, settings)

    def _write_one(self, model, video, folder: Path, settings: dict) -> None:
        from objslot.inference.display import display_maps
        from objslot.inference.segment import draw_regions, model_regions
        from objslot.inference.writer import write_segmentation
        from objslot.viz.report import MAX_FRAMES, spread

        folder.parent.mkdir(parents=True, exist_ok=True)
        with progress(f"{video.name}: finding objects") as update:
            regions = model_regions(
                model,
                video,
                instances=self.instances,
                iterations=self.iterations,
                spool_in=folder.parent,
                progress=update,
            )
        found = draw_regions(regions, video, spool_in=folder.parent)
        shown = spread(video.n_frames, MAX_FRAMES)
        attended = [shown[k] for k in spread(len(shown), ATTENTION_FRAMES)]
        maps = display_maps(model, video, regions, attended, iterations=self.iterations)
        with progress(f"{video.name}: writing") as update:
            summary = write_segmentation(video, found, folder, maps=maps, settings=settings, progress=update)
        objects, foreground = len(summary["objects"]), len(summary["foreground"])
        say(f"{video.name}: {foreground} objects, {objects - foreground} background tracks -> {folder}")
