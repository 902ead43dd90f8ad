"""Flags that describe a training run, and the configuration they make."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

from objslot.commands._common import Command, option
from objslot.errors import UserError

# What a flag is called in the configuration of the model; the others are fields of the training run.
_MODEL_FIELDS = {
    "encoder": "encoder",
    "weights": "weights",
    "resolution": "image_size",
    "slots": "slots",
    "instances": "instances",
    "marginal": "marginal",
    "train_encoder": "train_encoder",
}
_RUN_FIELDS = (
    "steps",
    "batch_size",
    "frames",
    "seed",
    "device",
    "precision",
    "cache_features",
    "accumulate",
    "recompute_encoder",
    "compile",
    "tensorboard",
)


@dataclasses.dataclass(kw_only=True)
class TrainingCommand(Command):
    """A subcommand that trains: the flags that all of them have."""

    called: ClassVar[dict[str, tuple[str, ...]]] = {"resolution": ("image_size", "frame size")}

    encoder: Annotated[str | None, option("A ViT or ResNet of timm.", "NAME", "vit_small_patch16_224.dino")] = None
    weights: Annotated[
        str | None,
        option("The encoder's weights, as safetensors or a PyTorch state dict.", "FILE", "timm downloads them"),
    ] = None
    steps: Annotated[int | None, option("Optimiser steps.", "N", 10000)] = None
    batch_size: Annotated[int | None, option("Clips in a step.", "B", 8)] = None
    frames: Annotated[int | None, option("Frames in a clip.", "T", 4)] = None
    resolution: Annotated[str | None, option("Side of a frame in pixels, or its height and width.", "PX|HxW", 256)] = (
        None
    )
    slots: Annotated[int | None, option("Semantics, the slots of the first stage.", "N", 16)] = None
    device: Annotated[str | None, option("auto takes a GPU where there is one.", "auto|cpu|cuda|cuda:N", "auto")] = None
    precision: Annotated[
        Literal["fp32", "bf16"] | None, option("Of the encoder and the matrix products.", "fp32|bf16", "fp32")
    ] = None

    def configuration(self, held: dict | None = None):
        """The `TrainingConfig` of the flags, on top of `held`, the "model" and "training" of a run, if given."""
        from objslot.models import SMTCConfig
        from objslot.training import TrainingConfig

        model = SMTCConfig() if held is None else SMTCConfig.from_dict(held["model"])
        run = TrainingConfig(model=model) if held is None else TrainingConfig(model=model, **held["training"])
        given = {name: value for name, value in vars(self).items() if value is not None and value is not False}
        if self.resolution is not None:
            given["resolution"] = _frame_size(self.resolution)
        model = dataclasses.replace(model, **{_MODEL_FIELDS[n]: v for n, v in given.items() if n in _MODEL_FIELDS})
        return dataclasses.replace(run, model=model, **{n: v for n, v in given.items() if n in _RUN_FIELDS})


def _frame_size(text: str) -> int | tuple[int, int]:
    """ "256" -> 256 and "252x448" -> (252, 448)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise UserError(f"--resolution: got {text!r}, expected pixels such as 256 or 252x448")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
