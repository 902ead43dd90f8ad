"""`objslot propagate`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

from objslot.commands._common import Command, load_model, option, say
from objslot.commands._judging import judge
from objslot.errors import UserError

DEFAULT_ENCODER = "vit_small_patch16_224.dino"


@dataclasses.dataclass(kw_only=True)
class Propagate(Command):
    """Carry the first frame's objects through videos by a backbone's features, and judge that: J and F."""

    dataset: Annotated[Literal["davis2017"], option("Layout of the annotated videos.")]
    root: Annotated[Path, option("Where the data set is.", "DIR")]
    out: Annotated[Path, option("Where to write masks, results.json, tables and pages.", "DIR")]
    model: Annotated[
        Path | None, option("Folder that `objslot train` wrote, to be compared with its untrained encoder.", "DIR")
    ] = None
    encoder: Annotated[
        str | None, option("Without a model: a ViT or ResNet of timm.", "NAME", DEFAULT_ENCODER)
    ] = None
    weights: Annotated[
        str | None,
        option(
            "Weights of the untrained encoder, as safetensors or a PyTorch state dict.",
            "FILE",
            "those the model started from, or timm's",
        ),
    ] = None
    stride: Annotated[
        Literal[16, 8] | None, option("Pixels of the frame to a position.", "16|8", "both, one after the other")
    ] = None
    sequences: Annotated[
        str | None,
        option(
            "Names of sequences, or a file or list of the data set with one name a line.",
            "A,B|FILE",
            "the list val, or all",
        ),
    ] = None

    def run(self) -> None:
        if self.model is not None and self.encoder is not None:
            raise UserError("give one of --model DIR and --encoder NAME: a model knows its encoder")
        from objslot.data.sequences import open_sequences
        from objslot.viz.folders import fresh_folder

        sequences = open_sequences(f"{self.dataset}-semi", self.root, self.sequences)
        strides = (16, 8) if self.stride is None else (self.stride,)
        encoders, runs = self._encoders(), {}
        with fresh_folder(self.out) as folder:
            for stride in strides:
                for name, encoder in encoders.items():
                    run = f"{name}-stride{stride}"
                    runs[run] = self._judge(folder / run, run, encoder, sequences, stride)
            results = {"dataset": self.dataset, "runs": runs, "settings": self._settings()}
            (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
            table = _table(runs)
            (folder / "table.md").write_text(table)
        say(table.rstrip())
        say(f"masks, figures and pages -> {self.out}")

    def _judge(self, folder: Path, run: str, encoder, sequences: list, stride: int) -> dict:
        """Figures of one encoder at one stride; its masks and pages go to `folder`."""
        from objslot.inference.propagate import SETTINGS, propagate_masks
        from objslot.viz import write_indexed_png

        def segment(sequence):
            found = propagate_masks(encoder, sequence.video, sequence.annotation(0), SETTINGS[stride])
            (folder / "masks" / sequence.name).mkdir(parents=True)
            for name, tracks in zip(sequence.frame_names, found.tracks, strict=True):
                write_indexed_png(folder / "masks" / sequence.name / f"{name}.png", tracks)
            return found

        folder.mkdir()
        settings = {**self._settings(), **dataclasses.asdict(SETTINGS[stride])}
        return judge(
            folder,
            segment,
            sequences,
            ("semi-supervised",),
            dataset=self.dataset,
            title=f"{run}: propagating",
            settings=settings,
        )

    def _settings(self) -> dict:
        from objslot import __version__

        return {
            "version": __version__,
            "root": str(self.root),
            "model": None if self.model is None else str(self.model),
            "encoder": self.encoder,
            "weights": self.weights,
        }

    def _encoders(self) -> dict:
        """What is compared, by name."""
        import torch

        from objslot.models.registry import build_encoder

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.model is None:
            return {"untrained": build_encoder(self.encoder or DEFAULT_ENCODER, weights=self.weights).to(device)}
        model = load_model(self.model)
        if not model.config.train_encoder:
            say("the encoder of this model was frozen in training: its figures are those of the untrained one")
            return {"untrained": model.encoder}
        weights = model.config.weights if self.weights is None else self.weights
        untrained = build_encoder(model.config.encoder, weights=weights, pretrained=model.config.pretrained)
        return {"trained": model.encoder, "untrained": untrained.to(device)}


def _table(runs: dict[str, dict]) -> str:
    from objslot.evaluation.tables import percent

    columns = {"JF": "J&F", "J": "J", "J_recall": "J recall", "J_decay": "J decay"}
    columns |= {"F": "F", "F_recall": "F recall", "F_decay": "F decay"}
    rows = [["run, sequence", *columns.values()], ["---", *["---:"] * len(columns)]]
    for run, results in runs.items():
        scores = {f"**{run}**": results["protocols"]}
        scores |= {f"{run}, {name}": result for name, result in results["sequences"].items()}
        rows += [[name, *(percent(s["semi-supervised"][c]) for c in columns)] for name, s in scores.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
