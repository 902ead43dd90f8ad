"""The demo: procedural videos, training without labels, and a judgement on videos that were never seen.

Nothing is downloaded. The encoder is the small one that ships with the package, frozen; what learns is the
model. Beside it, under the same label-free protocols, stand the colour null model and the frozen encoder.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from objslot.data import Video
from objslot.data.segmentation import VideoSegmentation
from objslot.data.synthetic import SyntheticVideo, SyntheticVideos
from objslot.evaluation import evaluate_dataset
from objslot.inference.baselines import colour_null, frozen_backbone
from objslot.inference.display import DisplayMaps, display_maps
from objslot.inference.segment import model_regions, to_segmentation
from objslot.inference.writer import write_segmentation
from objslot.models import SMTC, SMTCConfig
from objslot.training import TrainingConfig, train
from objslot.viz import colorize, contact_sheet, overlay
from objslot.viz.evaluation_report import EvaluationReport
from objslot.viz.folders import fresh_folder

LEAST_J = 0.60
"""J that the trained model is to reach, as a fraction, under protocol A and under protocol B."""
LEAST_RATIO = 1.5
"""J of the trained model over that of the null model, likewise."""

# Added to the seed, so that no seed's training video is another seed's held-out one.
_TRAINING, _HELD_OUT = 1_000_000, 2_000_000


@dataclass(frozen=True)
class DemoConfig:
    """How large the demo is. The defaults take a few minutes on two cores."""

    seed: int = 0
    """Of the videos and of the training."""
    training_videos: int = 24
    """Videos that the model learns from."""
    held_out_videos: int = 6
    """Videos it is judged on."""
    frames: int = 16
    """Length of a video."""
    size: int = 192
    """Side of a frame in pixels, a multiple of 8."""
    steps: int = 300
    """Optimiser steps."""
    batch_size: int = 4
    """Clips of a step."""
    lr: float = 2e-3
    """Learning rate at the start."""
    model: dict = field(
        default_factory=lambda: {
            "encoder": "objslot_tiny",
            "slots": 12,
            "instances": 1,
            "teacher_momentum": 0.99,
            "teacher_temperature": 1.0,
        }
    )
    """Fields of `SMTCConfig` that are not left at their defaults."""

    def training(self, features: Path) -> TrainingConfig:
        """The training run; `features` is the folder for the encoder's output."""
        return TrainingConfig(
            model=SMTCConfig(image_size=self.size, **self.model),
            steps=self.steps,
            batch_size=self.batch_size,
            frames=3,
            stride=max(1, min(4, (self.frames - 1) // 2)),
            lr=self.lr,
            seed=self.seed,
            num_workers=0,
            cache_features=True,
            cache_dir=str(features),
            checkpoint_every=self.steps,
            keep=1,
            log_every=25,
        )


def run_demo(
    out: str | Path, config: DemoConfig | None = None, *, say: Callable[[str], None] = lambda text: None
) -> dict:
    """Make videos, train, judge and draw.

    Args:
        out: a new folder. Gets model/ (the training run), videos/ (the held-out videos with their masks, in
            the layout of DAVIS-2017), found/ (masks, overlays and a page for each), results.json, report.html
            with sequences/, best_and_worst.png and sheet.png.
        config: sizes; the default ones if None.
        say: is told, in a line each, what is going on.

    Returns:
        What results.json holds: the result of `evaluate_dataset`, under ``settings`` how it was got and how
        many seconds that took, and under ``goals`` for protocols A and B ``J``, ``null``, ``frozen``,
        ``ratio`` to the null model and whether the goal is ``reached``.

    Raises:
        UserError: `out` exists and is not empty.
    """
    config = config or DemoConfig()
    clock = _Clock()
    with fresh_folder(Path(out)) as folder:
        lengths = config.frames, config.size
        learned_from = SyntheticVideos(_TRAINING + config.seed, config.training_videos, *lengths)
        held_out = SyntheticVideos(_HELD_OUT + config.seed, config.held_out_videos, *lengths)
        say(
            f"made {len(learned_from)} videos to learn from and {len(held_out)} to be judged on: "
            f"{held_out[0].n_objects} objects each, {config.frames} frames of {config.size} x {config.size}"
        )
        held_out.write(folder / "videos")
        clock("videos")
        with tempfile.TemporaryDirectory() as features:
            train(config.training(Path(features)), learned_from, folder / "model")
        clock("training")
        say(f"trained {config.steps} steps in {clock.seconds['training']:.0f} s; now judging")
        results = _judge(folder, config, held_out, clock)
        (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def summary(results: dict) -> str:
    """The table of the demo and its verdict, as text; J in percent."""
    lines = [f"{'J':26}{'null':>8}{'frozen':>8}{'trained':>9}{'trained / null':>16}"]
    titles = {"A": "A, label-free", "B": "B, official"}
    for protocol, goal in results["goals"].items():
        values = [f"{100 * goal[name]:.1f}" for name in ("null", "frozen", "J")]
        ratio = "-" if goal["ratio"] is None else f"{goal['ratio']:.2f}"
        lines.append(f"{titles[protocol]:26}{values[0]:>8}{values[1]:>8}{values[2]:>9}{ratio:>16}")
    reached = all(goal["reached"] for goal in results["goals"].values())
    verdict = "reached" if reached else "NOT reached"
    lines.append(f"goal {verdict}: J of at least {100 * LEAST_J:.0f} and {LEAST_RATIO} times the null model's, in both")
    return "\n".join(lines)


class _Clock:
    """Seconds since the last call, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def __call__(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 1), now


@dataclass
class _Found:
    """What was found in one video: the trained model's segmentation and maps, and every method's tracks."""

    trained: VideoSegmentation | None = None
    maps: DisplayMaps | None = None
    tracks: dict[str, np.ndarray] = field(default_factory=dict)


def _judge(folder: Path, config: DemoConfig, held_out: SyntheticVideos, clock: _Clock) -> dict:
    model = SMTC.load(folder / "model").eval().to("cuda" if torch.cuda.is_available() else "cpu")
    found = {video.name: _Found() for video in held_out}
    shown = {video.name: _most_hidden(video) for video in held_out}

    def keep(method: str, video: Video, segmentation: VideoSegmentation) -> VideoSegmentation:
        found[video.name].tracks[method] = segmentation.tracks[shown[video.name]]
        return segmentation

    def trained(sequence) -> VideoSegmentation:
        video = sequence.video
        regions = model_regions(model, video)
        entry = found[video.name]
        entry.trained = to_segmentation(regions, video)
        entry.maps = display_maps(model, video, regions, [shown[video.name]])
        return keep("trained", video, entry.trained)

    def frozen(sequence) -> VideoSegmentation:
        video = sequence.video
        return keep("frozen", video, frozen_backbone(model.encoder, video, resolution=config.size))

    def null(sequence) -> VideoSegmentation:
        return keep("null", sequence.video, colour_null(sequence.video))

    report = EvaluationReport(folder)
    results = evaluate_dataset(
        trained,
        [video.sequence for video in held_out],
        dataset="procedural videos",
        baselines={"null": null, "frozen": frozen},
        settings={"demo": asdict(config), "threads": torch.get_num_threads()},
        progress=lambda sequence, result: report.add(sequence, found[sequence.name].trained, result),
    )
    clock("judging")
    report.write(results)
    (folder / "sheet.png").rename(folder / "best_and_worst.png")
    for video in held_out:
        entry = found[video.name]
        write_segmentation(video, entry.trained, folder / "found" / video.name, maps=entry.maps)
    _sheet(held_out, found, shown, results).save(folder / "sheet.png")
    clock("pictures")
    results["settings"]["seconds"] = clock.seconds
    return results | {"goals": _goals(results)}


def _goals(results: dict) -> dict[str, dict]:
    goals = {}
    for protocol in ("A", "B"):
        own = results["protocols"][protocol]["J"]
        null, frozen = (results["baselines"][name][protocol]["J"] for name in ("null", "frozen"))
        goals[protocol] = {
            "J": own,
            "null": null,
            "frozen": frozen,
            "ratio": own / null if null else None,
            "reached": own >= LEAST_J and own >= LEAST_RATIO * null,
        }
    return goals


def _most_hidden(video: SyntheticVideo) -> int:
    """The frame in which least is seen of the objects: one is behind another."""
    return int(np.argmin([(video.annotation(i) > 0).sum() for i in range(video.n_frames)]))


def _sheet(held_out: SyntheticVideos, found: dict[str, _Found], shown: dict[str, int], results: dict):
    """One row a video: frame, annotation, semantic map, and what each method took for the objects."""
    methods = {
        "trained": results,
        "frozen": results["baselines"]["frozen"],
        "null": results["baselines"]["null"],
    }
    rows = []
    for video in held_out:
        t, entry = shown[video.name], found[video.name]
        frame = video.read([t])[0].numpy()
        row = [frame, overlay(frame, video.annotation(t), labels=False), colorize(entry.maps.semantic(t))]
        for method, judged in methods.items():
            matched = judged["sequences"][video.name]["B"]["objects"]
            row.append(overlay(frame, _matched(entry.tracks[method], matched), labels=False))
        rows.append(row)
    scores = ", ".join(f"{name} {100 * judged['protocols']['B']['J']:.1f}" for name, judged in methods.items())
    return contact_sheet(
        rows,
        columns=["frame", "annotation", "semantic map", "trained", "frozen encoder", "colour null"],
        row_titles=[video.name for video in held_out],
        title="Held-out videos: what was found without a label",
        subtitle=f"Each object's track under protocol B, in the object's colour. Mean J: {scores}.",
        cell_width=192,
    )


def _matched(tracks: np.ndarray, objects: list[dict]) -> np.ndarray:
    """Tracks that were assigned to objects, renumbered as these."""
    table = np.zeros(256, np.uint8)
    for entry in objects:
        if entry["track"]:
            table[entry["track"]] = entry["object"]
    return table[tracks]
