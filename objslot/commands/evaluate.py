"""`objslot evaluate`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from objslot.commands._common import Command, load_model, option, progress, say
from objslot.errors import UserError


@dataclasses.dataclass(kw_only=True)
class Evaluate(Command):
    """Judge a model, or the masks of any method, on annotated videos: J and F under named protocols."""

    dataset: Annotated[
        Literal["davis2016", "davis2017", "segtrack2", "fbms", "folder"],
        option("Layout of the annotated videos; folder: one folder of frames and one of masks a sequence."),
    ]
    root: Annotated[Path, option("Where the data set is.", "DIR")]
    out: Annotated[Path, option("Where to write results.json, tables and pictures.", "DIR")]
    model: Annotated[Path | None, option("Folder that `objslot train` wrote.", "DIR")] = None
    predictions: Annotated[
        Path | None,
        option("Instead of a model: a folder with one folder of indexed PNG masks a sequence.", "DIR"),
    ] = None
    sequences: Annotated[
        str | None,
        option(
            "Names of sequences, or a file or list of the data set with one name a line.",
            "A,B|FILE",
            "the list val, or all",
        ),
    ] = None
    protocols: Annotated[
        str, option("A label-free, B official, C oracle, semi-supervised.", "A,B,C", "A,B,C")
    ] = "A,B,C"
    baselines: Annotated[
        bool,
        option(
            "Also judge clusters of colour and position (null) and, with a model, its bare encoder (frozen)."
        ),
    ] = False

    def run(self) -> None:
        if (self.model is None) == (self.predictions is None):
            raise UserError("give one of --model DIR and --predictions DIR")
        from objslot.data.sequences import open_sequences
        from objslot.evaluation import evaluate_dataset
        from objslot.evaluation.protocols import check_protocols
        from objslot.viz.evaluation_report import EvaluationReport
        from objslot.viz.folders import fresh_folder

        protocols = check_protocols(name.strip() for name in self.protocols.split(",") if name.strip())
        sequences = open_sequences(self.dataset, self.root, self.sequences)
        with fresh_folder(self.out) as folder:
            segment, baselines = self._methods(sequences)
            report, kept = EvaluationReport(folder), {}

            def segment_and_keep(sequence):
                kept[sequence.name] = segment(sequence)
                return kept[sequence.name]

            with progress(f"{self.dataset}: judging", "sequences") as update:

                def judged(sequence, result):
                    report.add(sequence, kept.pop(sequence.name), result)
                    done.append(sequence.name)
                    update(len(done), len(sequences))

                done: list[str] = []
                results = evaluate_dataset(
                    segment_and_keep,
                    sequences,
                    protocols,
                    dataset=self.dataset,
                    baselines=baselines,
                    settings=self._settings(),
                    progress=judged,
                )
            report.write(results)
            _write_tables(folder, results)
        _print_table(results)
        say(f"figures, tables and pictures -> {self.out}")

    def _settings(self) -> dict:
        from objslot import __version__

        return {
            "version": __version__,
            "root": str(self.root),
            "model": None if self.model is None else str(self.model),
            "predictions": None if self.predictions is None else str(self.predictions),
        }

    def _methods(self, sequences):
        """What segments a sequence, and the baselines by name."""
        from objslot.evaluation.dataset import prediction_reader

        baselines = {}
        if self.model is None:
            segment = prediction_reader(self.predictions, sequences)
        else:
            model = load_model(self.model)
            from objslot.inference import segment_video

            def segment(sequence):
                return segment_video(model, sequence.video, merge_foreground=sequence.merge_objects)

        if self.baselines:
            from objslot.inference.baselines import colour_null, frozen_backbone

            baselines["null"] = lambda sequence: colour_null(
                sequence.video, merge_foreground=sequence.merge_objects
            )
            if self.model is not None:
                baselines["frozen"] = lambda sequence: frozen_backbone(
                    model.encoder,
                    sequence.video,
                    resolution=min(model.frame_size),
                    merge_foreground=sequence.merge_objects,
                )
        return segment, baselines


def _write_tables(folder: Path, results: dict) -> None:
    from objslot.evaluation import markdown_table, plain_table

    (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (folder / "table.md").write_text(markdown_table(results))
    (folder / "table.txt").write_text(plain_table(results))


def _print_table(results: dict) -> None:
    from objslot.evaluation import plain_table, rich_table

    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(rich_table(results))
    else:
        say(plain_table(results).rstrip())
