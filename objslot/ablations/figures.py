"""The figures of the paper, drawn from trained models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from objslot.ablations.diagram import draw_diagram
from objslot.ablations.tables import FULL, STAGE_ONE, THREE, UNMASKED
from objslot.data.masks import VOID
from objslot.data.sequences import Sequence as AnnotatedSequence
from objslot.inference.regions import frame_size, normalise
from objslot.models import SMTC
from objslot.models.branch import SlotMaps
from objslot.viz import contact_sheet, overlay, overlay_colors
from objslot.viz.report import jpeg_uri, spread

ROWS = 6
"""Most sequences that a figure shows."""
INFERENCE_INSTANCES = (3, 4, 5)
_WIDTH = 288
"""Of a picture, in pixels."""
_HEAT = np.array([255, 170, 0], np.float32)
_CHOICE = "The semantics shown is the one whose region overlaps the annotated objects most."


@dataclass(frozen=True)
class _Shot:
    """One frame of a sequence, with the one before it, as people see it."""

    sequence: AnnotatedSequence
    position: int
    frame: np.ndarray
    objects: np.ndarray

    def maps(self, model: SMTC, **options) -> SlotMaps:
        """What a model finds in the two frames; the last one is this."""
        clip = self.sequence.video.read([max(self.position - 1, 0), self.position])
        parameter = next(model.parameters())
        size = frame_size(model.encoder, self.sequence.size, min(model.frame_size))
        frames = normalise(clip.to(parameter.device), size).to(parameter.dtype)
        return model.segment(model.encode(frames[None]), **options)

    def enlarge(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps (..., HW) at the size of the picture."""
        flat = maps.float().cpu().reshape(1, -1, *grid)
        large = F.interpolate(flat, self.frame.shape[:2], mode="bilinear", align_corners=False)
        return large[0].unflatten(0, maps.shape[:-1])

    def object_semantics(self, semantic: Tensor, grid: tuple[int, int]) -> int:
        """The semantics, of masks (N, HW), whose region has the largest IoU with the annotated objects."""
        region = self.enlarge(semantic, grid).argmax(0)
        there = torch.from_numpy(self.objects > 0)
        overlaps = [
            ((region == n) & there).sum() / ((region == n) | there).sum().clamp_min(1) for n in range(len(semantic))
        ]
        return int(torch.stack(overlaps).argmax())


def draw_figures(folder: Path, models: Mapping[str, SMTC], sequences: Sequence[AnnotatedSequence]) -> list[dict]:
    """Figures 1 to 5 as files in `folder` and, for a page, as a title, a caption and a picture each.

    Args:
        folder: gets figure-1.svg and figure-2.png to figure-5.png.
        models: by the names of the variants in `tables`: the full training, stage 1 only, without masked
            aggregation, and trained with P = 3.
        sequences: where frames are taken from, the first `ROWS` of them; annotations serve only to choose which
            semantics is shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    full = models[FULL.name]
    diagram = draw_diagram(full)
    (folder / "figure-1.svg").write_text(diagram, encoding="utf-8")
    figures = [
        {
            "title": "Figure 1: the two stages",
            "caption": "Shapes are those of the code, read off a pass of the trained model. What the second stage "
            "does otherwise is in red.",
            "svg": diagram,
        }
    ]
    shots = [_shot(sequence) for sequence in sequences[:ROWS]]
    drawings: list[tuple[str, str, Callable[[], tuple[list[str], list[list[np.ndarray]]]]]] = [
        (
            "Figure 2: trained with P = 3, used with P = 3, 4 and 5",
            f"{_CHOICE} Its positions are coloured by the instance they belong to.",
            lambda: _more_instances(shots, models[THREE.name]),
        ),
        (
            "Figure 3: soft semantic maps, with full training and with stage 1 only",
            f"Each position mixes the colours of all semantics by their shares; beside it one semantics. {_CHOICE}",
            lambda: _semantic_maps(shots, full, models[STAGE_ONE.name]),
        ),
        (
            "Figure 4: instance maps, with and without masked aggregation",
            f"{_CHOICE} Brightness is its share of a position, full where it is largest; colour is the instance.",
            lambda: _instance_maps(shots, full, models[UNMASKED.name]),
        ),
        (
            "Figure 5: attention of one slot after every iteration",
            f"{_CHOICE} The instance is the largest one inside it. Each map is scaled to the slot's largest value.",
            lambda: _iterations(shots, full),
        ),
    ]
    for number, (title, caption, draw) in enumerate(drawings, start=2):
        columns, rows = draw()
        sheet = contact_sheet(
            rows,
            columns=columns,
            row_titles=[shot.sequence.name for shot in shots],
            title=title,
            cell_width=_WIDTH,
        )
        sheet.save(folder / f"figure-{number}.png")
        picture = jpeg_uri(np.asarray(sheet), max_side=1800, quality=85)
        figures.append({"title": title, "caption": caption, "picture": picture})
    return figures


def _shot(sequence: AnnotatedSequence) -> _Shot:
    """The annotated frame in the middle of a sequence."""
    positions = [t for t in sequence.annotated if t > 0] or list(sequence.annotated)
    position = positions[spread(len(positions), 3)[len(positions) > 2]]
    height = round(_WIDTH * sequence.size[0] / sequence.size[1])
    frame = Image.fromarray(sequence.video.read([position])[0].numpy()).resize((_WIDTH, height))
    annotation = sequence.annotation(position)
    annotation = Image.fromarray(np.where(annotation == VOID, 0, annotation).astype(np.uint8))
    objects = np.asarray(annotation.resize((_WIDTH, height), Image.Resampling.NEAREST))
    return _Shot(sequence, position, np.asarray(frame), objects)


def _more_instances(shots: Sequence[_Shot], model: SMTC):
    columns = ["frame and annotation", *(f"P = {count}" for count in INFERENCE_INSTANCES)]
    rows = []
    for shot in shots:
        row = [overlay(shot.frame, shot.objects, labels=False)]
        for count in INFERENCE_INSTANCES:
            maps = shot.maps(model, instances=count)
            semantic, instance = maps.semantic[0, -1], maps.instance[0, -1]
            chosen = shot.object_semantics(semantic, maps.grid)
            inside = shot.enlarge(semantic, maps.grid).argmax(0) == chosen
            index = (shot.enlarge(instance[chosen], maps.grid).argmax(0) + 1) * inside
            row.append(overlay(_dim(shot.frame), index.to(torch.uint8).numpy(), labels=False, alpha=0.6))
        rows.append(row)
    return columns, rows


def _semantic_maps(shots: Sequence[_Shot], full: SMTC, stage_one: SMTC):
    columns = ["frame and annotation", "full: all", "full: objects'", "stage 1 only: all", "stage 1 only: objects'"]
    rows = []
    for shot in shots:
        row = [overlay(shot.frame, shot.objects, labels=False)]
        for model in (full, stage_one):
            maps = shot.maps(model)
            semantic = maps.semantic[0, -1]
            large = shot.enlarge(semantic, maps.grid)
            row += [_mixed(large), _heat(shot.frame, large[shot.object_semantics(semantic, maps.grid)])]
        rows.append(row)
    return columns, rows


def _instance_maps(shots: Sequence[_Shot], masked: SMTC, unmasked: SMTC):
    columns = ["frame and annotation", "with", "without"]
    rows = []
    for shot in shots:
        row = [overlay(shot.frame, shot.objects, labels=False)]
        for model in (masked, unmasked):
            maps = shot.maps(model)
            semantic, instance = maps.semantic[0, -1], maps.instance[0, -1]
            chosen = shot.object_semantics(semantic, maps.grid)
            shares = shot.enlarge(semantic[chosen] * instance[chosen], maps.grid)
            row.append(_mixed(shares / shares.sum(0).max().clamp_min(1e-12)))
        rows.append(row)
    return columns, rows


def _iterations(shots: Sequence[_Shot], model: SMTC):
    counts = range(1, model.config.iterations + 1)
    columns = ["frame", *(f"semantics, {i}" for i in counts), *(f"instance, {i}" for i in counts)]
    rows = []
    for shot in shots:
        maps = shot.maps(model, return_iterations=True)
        chosen = shot.object_semantics(maps.semantic[0, -1], maps.grid)
        mask = maps.semantic[0, -1, chosen]
        largest = int((mask * maps.instance[0, -1, chosen]).sum(-1).argmax())
        semantic = torch.stack([after.semantic[0, -1, chosen] for after in maps.iterations])
        instance = torch.stack([mask * after.instance[0, -1, chosen, largest] for after in maps.iterations])
        row = [shot.frame]
        for slot in (semantic, instance):
            large = shot.enlarge(slot / slot.max().clamp_min(1e-12), maps.grid)
            row += [_heat(shot.frame, attention) for attention in large]
        rows.append(row)
    return columns, rows


def _dim(frame: np.ndarray) -> np.ndarray:
    grey = frame.mean(-1, keepdims=True)
    return np.broadcast_to(0.6 * grey, frame.shape).astype(np.uint8)


def _heat(frame: np.ndarray, attention: Tensor) -> np.ndarray:
    """Attention (H, W) in 0 to 1 as light on the dimmed frame."""
    weight = attention.clamp(0, 1).numpy()[..., None]
    return (_dim(frame) * (1 - 0.85 * weight) + 0.85 * weight * _HEAT).round().astype(np.uint8)


def _mixed(shares: Tensor) -> np.ndarray:
    """Shares (K, H, W), summing to at most 1, as the mixture of K colours on black."""
    colors = torch.from_numpy(overlay_colors()[1 : len(shares) + 1].astype(np.float32))
    return torch.einsum("khw,kc->hwc", shares, colors).clamp(0, 255).round().to(torch.uint8).numpy()
