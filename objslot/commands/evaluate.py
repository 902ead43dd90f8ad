"""`objslot evaluate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from objslot.commands._common import Command, load_model, option, say
from objslot.commands._judging import judge, print_tables
from objslot.errors import UserError


@dataclasses.dataclass(kw_only=True)
class Evaluate(Command):
    """Judge a model, or the masks of any method, on annotated videos: J and F under named protocols."""

    dataset: Annotated[
        Literal["davis2016", "davis2017", "davis2017-semi", "segtrack2", "fbms", "folder"],
        option(
            "Layout of the annotated videos; folder: one folder of frames and one of masks a sequence; "
            "davis2017-semi: the task whose first annotation is given."
        ),
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
        str | None,
        option(
            "A label-free, B official, C oracle; semi-supervised, for davis2017-semi.",
            "A,B,C",
            "A,B,C, or the only one of davis2017-semi",
        ),
    ] = None
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
        from objslot.viz.folders import fresh_folder

        protocols = self._protocols()
        sequences = open_sequences(self.dataset, self.root, self.sequences)
        with fresh_folder(self.out) as folder:
            segment, baselines = self._methods(sequences)
            results = judge(
                folder,
                segment,
                sequences,
                protocols,
                dataset=self.dataset,
                title=f"{self.dataset}: judging",
                baselines=baselines,
                settings=self._settings(),
            )
        print_tables(results)
        say(f"figures, tables and pictures -> {self.out}")

    def _protocols(self) -> tuple[str, ...]:
        from objslot.evaluation.protocols import check_protocols

        only = self.dataset == "davis2017-semi"
        default = "semi-supervised" if only else "A,B,C"
        words = default if self.protocols is None else self.protocols
        protocols = check_protocols(name.strip() for name in words.split(",") if name.strip())
        given = "semi-supervised" in protocols
        if (only and protocols != ("semi-supervised",)) or (given and not only and self.dataset != "folder"):
            raise UserError(
                f"--protocols: got {', '.join(protocols)} for --dataset {self.dataset}; expected semi-supervised, and "
                "nothing else, for davis2017-semi, and not that protocol for other data sets than that and folder"
            )
        if given and (self.predictions is None or self.baselines):
            raise UserError(
                "the protocol semi-supervised judges masks that continue the first frame's: expected --predictions "
                "DIR and no --baselines (objslot propagate makes such masks)"
            )
        return protocols

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
        if self.baselines:
            from objslot.inference.baselines import colour_null

            baselines["null"] = lambda sequence: colour_null(
                sequence.video, merge_foreground=sequence.merge_objects
            )
        if self.model is None:
            return prediction_reader(self.predictions, sequences), baselines

        import torch

        from objslot.inference.baselines import frozen_backbone
        from objslot.inference.regions import encode_video
        from objslot.inference.segment import model_regions, to_segmentation

        model, encoded = load_model(self.model), {}
        resolution = min(model.frame_size)

        def segment(sequence):
            features = encode_video(model.encoder, sequence.video, short_side=resolution)
            if self.baselines:
                # The frozen backbone is judged on the same features, right after the model.
                with torch.no_grad():
                    features = encoded[sequence.name] = [chunk._replace(tokens=None) for chunk in features]
            regions = model_regions(model, sequence.video, features=features)
            return to_segmentation(regions, sequence.video, merge_foreground=sequence.merge_objects)

        if self.baselines:
            baselines["frozen"] = lambda sequence: frozen_backbone(
                model.encoder,
                sequence.video,
                resolution=resolution,
                merge_foreground=sequence.merge_objects,
                features=encoded.pop(sequence.name),
            )
        return segment, baselines
