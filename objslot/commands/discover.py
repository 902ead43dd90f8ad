"""`objslot discover`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from objslot.commands._common import Command, load_model, progress, say
from objslot.errors import UserError


@dataclasses.dataclass(kw_only=True)
class Discover(Command):
    """Find the objects in videos with a trained model; write masks, an overlay video and a page to look at."""

    videos: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(
        metavar="VIDEO", help="Video files, folders of frames, or folders that hold them.")]
    model: Annotated[Path, tyro.conf.arg(metavar="DIR", help="Folder that `objslot train` wrote.")]
    out: Annotated[Path, tyro.conf.arg(metavar="DIR", help="Where to write; one folder a video.")]
    instances: Annotated[int | None, tyro.conf.arg(
        metavar="P", help="Instances of one semantics; as in training by default.")] = None
    iterations: Annotated[int | None, tyro.conf.arg(
        metavar="I", help="Slot attention iterations; as in training by default.")] = None

    def run(self) -> None:
        for name in ("instances", "iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")
        if not self.videos:
            raise UserError("name at least one VIDEO: a video file or a folder of frames")
        from objslot.data import find_videos
        from objslot.inference.writer import output_folders, write_segmentation

        videos = [video for path in self.videos for video in find_videos(path)]
        folders = output_folders(self.out, [video.name for video in videos])
        model = load_model(self.model)
        from objslot.inference import segment_video

        settings = {"model": str(self.model), "instances": self.instances, "iterations": self.iterations}
        for video, folder in zip(videos, folders, strict=True):
            with progress(f"{video.name}: finding objects") as update:
                found = segment_video(
                    model, video, instances=self.instances, iterations=self.iterations, progress=update
                )
            with progress(f"{video.name}: writing") as update:
                write_segmentation(video, found, folder, settings=settings, progress=update)
            say(f"{video.name}: {len(found.track_ids)} objects, {len(found.foreground)} foreground -> {folder}")
