"""`objslot train`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from objslot.commands._common import Command, option, say
from objslot.errors import UserError

# What a flag is called in the configuration of the model; the others are fields of the training run.
_MODEL_FIELDS = {
    "encoder": "encoder",
    "weights": "weights",
    "resolution": "image_size",
    "slots": "slots",
    "instances": "instances",
    "marginal": "marginal",
}
_RUN_FIELDS = (
    "steps",
    "batch_size",
    "frames",
    "seed",
    "device",
    "precision",
    "cache_features",
    "tensorboard",
)


@dataclasses.dataclass(kw_only=True)
class Train(Command):
    """Train a model on videos, without labels. With --resume, flags that are not given stay as they were."""

    data: Annotated[
        tyro.conf.Positional[Path],
        option("A video, a folder of videos or of frame folders, a DAVIS or YouTube-VOS folder.", "DATA"),
    ]
    out: Annotated[
        Path, option("Gets config.json, metrics.jsonl, checkpoints/ and model.safetensors.", "DIR")
    ]
    encoder: Annotated[
        str | None, option("A ViT or ResNet of timm.", "NAME", "vit_small_patch16_224.dino")
    ] = None
    weights: Annotated[
        str | None,
        option(
            "The encoder's weights, as safetensors or a PyTorch state dict.", "FILE", "timm downloads them"
        ),
    ] = None
    steps: Annotated[int | None, option("Optimiser steps.", "N", 10000)] = None
    batch_size: Annotated[int | None, option("Clips in a step.", "B", 8)] = None
    frames: Annotated[int | None, option("Frames in a clip.", "T", 4)] = None
    resolution: Annotated[
        str | None, option("Side of a frame in pixels, or its height and width.", "PX|HxW", 256)
    ] = None
    slots: Annotated[int | None, option("Semantics, the slots of the first stage.", "N", 16)] = None
    instances: Annotated[int | None, option("Instances of each semantics.", "P", 4)] = None
    marginal: Annotated[
        Literal["uniform", "caam", "attention"] | None,
        option("Mass of a position in the transport plan.", "uniform|caam|attention", "uniform"),
    ] = None
    seed: Annotated[int | None, option("Seed of everything random.", "S", 0)] = None
    device: Annotated[
        str | None, option("auto takes a GPU where there is one.", "auto|cpu|cuda|cuda:N", "auto")
    ] = None
    precision: Annotated[
        Literal["fp32", "bf16"] | None, option("Of the encoder and the matrix products.", "fp32|bf16", "fp32")
    ] = None
    cache_features: Annotated[
        bool, option("Encode every video once and train on the stored features, without augmentation.")
    ] = False
    tensorboard: Annotated[bool, option("Write TensorBoard events as well.")] = False
    resume: Annotated[bool, option("Go on from the newest checkpoint in --out.")] = False

    def run(self) -> None:
        from objslot.training import train

        train(self.configuration(), self.data, self.out, resume=self.resume)
        # Started by torchrun, one process speaks for all.
        if os.environ.get("RANK", "0") == "0":
            say(f"trained model -> {self.out}")

    def configuration(self):
        """The `TrainingConfig` of the flags, on top of the resumed run's where there is one."""
        from objslot.models import SMTCConfig
        from objslot.training import TrainingConfig

        held = self._held() if self.resume else None
        model = SMTCConfig() if held is None else SMTCConfig.from_dict(held["model"])
        run = TrainingConfig(model=model) if held is None else TrainingConfig(model=model, **held["training"])
        given = {
            name: value for name, value in vars(self).items() if value is not None and value is not False
        }
        if self.resolution is not None:
            given["resolution"] = _frame_size(self.resolution)
        model = dataclasses.replace(
            model, **{_MODEL_FIELDS[n]: v for n, v in given.items() if n in _MODEL_FIELDS}
        )
        return dataclasses.replace(run, model=model, **{n: v for n, v in given.items() if n in _RUN_FIELDS})

    def _held(self) -> dict | None:
        path = self.out / "config.json"
        if not path.exists():
            return None
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            return {"model": held["model"], "training": dict(held["training"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not the configuration of a training run ({type(error).__name__})"
            ) from error


def _frame_size(text: str) -> int | tuple[int, int]:
    """"256" -> 256 and "252x448" -> (252, 448)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise UserError(f"--resolution: got {text!r}, expected pixels such as 256 or 252x448")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
