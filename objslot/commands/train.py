"""`objslot train`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from objslot.commands._common import option, say
from objslot.commands._training import TrainingCommand
from objslot.errors import UserError


@dataclasses.dataclass(kw_only=True)
class Train(TrainingCommand):
    """Train a model on videos, without labels. With --resume, flags that are not given stay as they were."""

    data: Annotated[
        tyro.conf.Positional[Path],
        option("A video, a folder of videos or of frame folders, a DAVIS or YouTube-VOS folder.", "DATA"),
    ]
    out: Annotated[Path, option("Gets config.json, metrics.jsonl, checkpoints/ and model.safetensors.", "DIR")]
    instances: Annotated[int | None, option("Instances of each semantics.", "P", 4)] = None
    marginal: Annotated[
        Literal["uniform", "caam", "attention"] | None,
        option("Mass of a position in the transport plan.", "uniform|caam|attention", "uniform"),
    ] = None
    seed: Annotated[int | None, option("Seed of everything random.", "S", 0)] = None
    cache_features: Annotated[
        bool, option("Encode every video once and train on the stored features, without augmentation.")
    ] = False
    train_encoder: Annotated[bool, option("Train the encoder too, from step 3000.")] = False
    recompute_encoder: Annotated[
        bool, option("Save the memory of a trained encoder's activations: compute them twice.")
    ] = False
    accumulate: Annotated[int | None, option("Parts a step's batch is cut into, to save memory.", "N", 1)] = None
    compile: Annotated[bool, option("Compile encoder and model with torch.compile.")] = False
    tensorboard: Annotated[bool, option("Write TensorBoard events as well.")] = False
    resume: Annotated[bool, option("Go on from the newest checkpoint in --out.")] = False

    def run(self) -> None:
        from objslot.training import train

        train(self.configuration(self._held() if self.resume else None), self.data, self.out, resume=self.resume)
        # Started by torchrun, one process speaks for all.
        if os.environ.get("RANK", "0") == "0":
            say(f"trained model -> {self.out}")

    def _held(self) -> dict | None:
        path = self.out / "config.json"
        if not path.exists():
            return None
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            return {"model": held["model"], "training": dict(held["training"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the configuration of a training run ({type(error).__name__})") from error
