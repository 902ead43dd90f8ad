"""Pages and contact sheet of an evaluation: figures, curves, best and worst frames of every sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from objslot.data.masks import VOID
from objslot.data.segmentation import VideoSegmentation
from objslot.data.sequences import Sequence
from objslot.viz.folders import safe_name
from objslot.viz.overlay import contours, overlay
from objslot.viz.report import VideoReport, jpeg_uri, write_page
from objslot.viz.sheet import contact_sheet

MEANINGS = {
    "A": "label-free: what the method itself calls foreground",
    "B": "official DAVIS unsupervised: at most 20 tracks, one assignment a video",
    "C": "oracle: the best choice of regions in every frame, made with the annotation",
    "semi-supervised": "official DAVIS semi-supervised: the first frame is given",
}
_SHEET_ROWS = 12
_MEASURES = ("J", "F", "JF")
_STATISTICS = ("JF", "J", "J_recall", "J_decay", "F", "F_recall", "F_decay")


class EvaluationReport:
    """Writes OUT/sequences/<name>.html as sequences are judged, then OUT/report.html and OUT/sheet.png.

    Args:
        out: an existing folder.
    """

    def __init__(self, out: str | Path):
        self._out = Path(out)
        self._sequences: list[dict] = []
        self._rows: list[list[np.ndarray]] = []
        self._titles: list[str] = []

    def add(self, sequence: Sequence, segmentation: VideoSegmentation, result: dict) -> None:
        """Writes the page of one sequence.

        Args:
            sequence: what was judged; without frames there is nothing to show and only its figures are kept.
            segmentation: the masks, for every frame of the sequence.
            result: from `evaluate_sequence`.
        """
        protocols = [name for name in MEANINGS if name in result]
        first = result[protocols[0]]["curve"]
        entry = {
            "name": sequence.name,
            "href": None,
            "protocol": protocols[0],
            "length": sequence.n_frames,
            "scores": {name: {m: result[name][m] for m in _MEASURES} for name in protocols},
            "regions": result["regions"],
            "objects": {name: result[name]["objects"] for name in protocols},
            "curve": {"frames": first["frames"], "J": first["J"], "F": first["F"]},
            "frames": [],
        }
        if sequence.video is not None:
            page = f"sequences/{safe_name(sequence.name)}.html"
            (self._out / "sequences").mkdir(exist_ok=True)
            shown = self._write_sequence(sequence, segmentation, result, protocols, self._out / page)
            entry["href"] = page
            for label in ("best", "worst"):
                at = first["frames"].index(first[label])
                entry["frames"].append(
                    {
                        "label": label,
                        "frame": first[label],
                        "J": first["J"][at],
                        "F": first["F"][at],
                        "picture": jpeg_uri(shown[first[label]][1], max_side=400),
                    }
                )
            if len(self._rows) < _SHEET_ROWS:
                self._rows.append([*shown[first["best"]], *shown[first["worst"]]])
                self._titles.append(sequence.name)
        self._sequences.append(entry)

    def _write_sequence(self, sequence, segmentation, result, protocols, path) -> dict[int, tuple]:
        """Pictures (annotation, found) of the best and the worst frame by number."""
        curve = result[protocols[0]]["curve"]
        marks = {"Best": curve["best"], "Worst": curve["worst"]}
        only = segmentation.foreground if protocols[0] == "A" else None
        report = VideoReport(sequence.name, sequence.n_frames, sequence.size, sequence.video.fps)
        pictures = {}
        blank = np.zeros(sequence.size, np.uint8)
        for t, frame in enumerate(sequence.video.frames()):
            frame, tracks = np.asarray(frame), segmentation.tracks[t]
            annotation = sequence.annotation(t)
            annotation = (
                blank if annotation is None else np.where(annotation == VOID, 0, annotation).astype(np.uint8)
            )
            layers = {"objects": tracks, "truth": annotation}
            if segmentation.partition is not None:
                layers["slots"] = segmentation.partition[t]
            report.add(t, frame, layers)
            if t in marks.values():
                pictures[t] = (
                    overlay(frame, annotation, labels=False),
                    _outlined(frame, tracks, annotation, only),
                )
        objects = [
            {"id": k, "score": segmentation.scores.get(k), "foreground": k in segmentation.foreground}
            for k in segmentation.track_ids
        ]
        facts = [
            f"{name}: J {100 * result[name]['J']:.1f}, F {100 * result[name]['F']:.1f} ({MEANINGS[name]})"
            for name in protocols
        ]
        curves = {
            f"{protocols[0]} {measure}": _every_frame(sequence.n_frames, curve["frames"], curve[measure])
            for measure in ("J", "F")
        }
        report.write(path, objects, facts=facts, curves=curves, marks=marks)
        return pictures

    def write(self, results: dict) -> None:
        """Writes OUT/report.html and, with frames, OUT/sheet.png of what `evaluate_dataset` returned."""
        methods = {"this run": results["protocols"]}
        methods |= {f"baseline: {name}": scores["protocols"] for name, scores in results["baselines"].items()}
        tables = [
            {
                "name": name,
                "meaning": MEANINGS[name],
                "rows": [
                    {"method": method, **{m: scores[name][m] for m in _STATISTICS}}
                    for method, scores in methods.items()
                ],
            }
            for name in results["protocols"]
        ]
        regions = [{"method": "this run", **results["regions"]}]
        regions += [
            {"method": f"baseline: {name}", **scores["regions"]} for name, scores in results["baselines"].items()
        ]
        data = {
            "dataset": results["dataset"],
            "tables": tables,
            "regions": regions,
            "sequences": self._sequences,
        }
        write_page(self._out / "report.html", "evaluation.html", data)
        if self._rows:
            columns = ["best: annotation", "best: found", "worst: annotation", "worst: found"]
            shown, judged = len(self._rows), len(self._sequences)
            whose = "each sequence" if shown == judged else f"the first {shown} of {judged} sequences"
            title = f"{results['dataset']}: best and worst frame of {whose}"
            sheet = contact_sheet(
                self._rows, columns=columns, row_titles=self._titles, title=title, cell_width=280
            )
            sheet.save(self._out / "sheet.png")


def _outlined(frame, tracks, annotation, only) -> np.ndarray:
    picture = overlay(frame, tracks, only=only).copy()
    picture[contours(annotation, max(1, round(min(annotation.shape) / 160)))] = 255
    return picture


def _every_frame(n_frames: int, frames: list[int], values: list[float]) -> list[float | None]:
    known = dict(zip(frames, values, strict=True))
    return [known.get(t) for t in range(n_frames)]
