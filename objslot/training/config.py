"""What a training run is: the model and how it is optimised, fed and recorded."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from objslot.errors import UserError
from objslot.models import SMTCConfig

# Fields that change how a run is carried out but not what it computes: free to differ when it is resumed.
OPERATIONAL = frozenset(
    {
        "device",
        "recompute_encoder",
        "num_workers",
        "log_every",
        "checkpoint_every",
        "keep",
        "tensorboard",
        "cache_dir",
        "cache_limit",
        "max_unreadable",
        "max_nonfinite",
    }
)


def _count(least: int):
    return (
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"an integer of at least {least}",
    )


def _number(holds, expected: str):
    return (
        lambda value: (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and holds(value)
        ),
        expected,
    )


_CHECKS = {
    "steps": _count(1),
    "batch_size": _count(1),
    "frames": _count(2),
    "stride": _count(1),
    "lr": _number(lambda value: value > 0, "a number above 0"),
    "weight_decay": _number(lambda value: value >= 0, "a number of at least 0"),
    "encoder_lr_scale": _number(lambda value: value >= 0, "a number of at least 0"),
    "unfreeze_at": _count(0),
    "accumulate": _count(1),
    "precision": (lambda value: value in ("fp32", "bf16"), "fp32 or bf16"),
    "seed": _count(0),
    "num_workers": (lambda value: value is None or _count(0)[0](value), "an integer of at least 0"),
    "checkpoint_every": _count(1),
    "keep": _count(1),
    "log_every": _count(1),
    "cache_limit": _number(lambda value: value > 0, "a number of gigabytes above 0"),
    "max_unreadable": _number(lambda value: 0 <= value <= 1, "a share from 0 to 1"),
    "max_nonfinite": _count(1),
}


@dataclass(frozen=True)
class TrainingConfig:
    """A training run.

    Raises `UserError` on construction, naming the field, what came and what was expected.
    """

    model: SMTCConfig = field(default_factory=SMTCConfig)
    """The model to train."""
    steps: int = 10_000
    """Optimiser steps."""
    batch_size: int = 8
    """Clips per step, over all processes together."""
    frames: int = 4
    """Frames of a clip."""
    stride: int = 4
    """Frames of the video from one frame of a clip to the next; less where a video is short."""
    lr: float = 4e-4
    """Learning rate at the start; it falls along a cosine to a tenth of it."""
    weight_decay: float = 0.1
    """Weight decay of AdamW, on matrices only."""
    encoder_lr_scale: float = 0.01
    """Learning rate of the encoder over that of the rest, where the encoder is trained."""
    unfreeze_at: int = 3000
    """Step from which the encoder learns too, where it is trained."""
    accumulate: int = 1
    """Parts a step's batch is cut into, in each process, to save memory."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the encoder and the matrix products in bfloat16; weights and losses stay in fp32."""
    recompute_encoder: bool = False
    """Keep only the inputs of the blocks of an encoder that is trained, and compute the rest again going back."""
    compile: bool = False
    """Compile the encoder and the model with torch.compile."""
    seed: int = 0
    """Seed of the weights, the clips, the augmentation and the noise."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    num_workers: int | None = None
    """Processes that read and resize clips; by default one for every core but one, at most 8."""
    cache_features: bool = False
    """Encode every video once, store the features and train on them; no photometric augmentation then."""
    cache_dir: str | None = None
    """Folder of the stored features; by default `features` in the output folder."""
    cache_limit: float = 50.0
    """Most that the stored features may take, in gigabytes."""
    checkpoint_every: int = 500
    """Steps from one checkpoint to the next."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    log_every: int = 10
    """Steps from one line of a log to the next; metrics.jsonl has every step."""
    tensorboard: bool = False
    """Write TensorBoard events as well."""
    max_unreadable: float = 0.5
    """Stop when more than this share of the videos turns out to be unreadable."""
    max_nonfinite: int = 5
    """Stop after this many steps in a row whose loss or gradient is not finite."""

    def __post_init__(self):
        for name, (holds, expected) in _CHECKS.items():
            value = getattr(self, name)
            if not holds(value):
                raise UserError(f"{name}: got {value!r}, expected {expected}")
        try:
            device = torch.device("cpu" if self.device == "auto" else self.device)
        except (RuntimeError, TypeError):
            raise UserError(f"device: got {self.device!r}, expected auto, cpu, cuda or cuda:N") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device: got {self.device!r}, but no CUDA device can be used here")
        if self.model.n_other > self.frames - 1 and self.model.sampling == "other":
            others = f"the {self.model.n_other} others that a frame is compared with (n_other)"
            raise UserError(f"frames: got {self.frames}, expected more than {others}")
        if self.cache_features and self.model.train_encoder:
            raise UserError("cache_features: features cannot be stored while the encoder is trained (train_encoder)")
        if self.recompute_encoder and not self.model.train_encoder:
            raise UserError("recompute_encoder: nothing is kept of an encoder that is not trained (train_encoder)")
        if self.batch_size % self.accumulate:
            raise UserError(f"accumulate: got {self.accumulate}, expected a divisor of batch_size = {self.batch_size}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, as JSON gives them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def learning_rate_factor(self, step: int) -> float:
        """What the learning rates are multiplied with: a cosine from 1 at step 0 to 0.1 at ``steps``."""
        return 0.55 + 0.45 * math.cos(math.pi * step / self.steps)


def changed_fields(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """ "field: before -> now" for every field, of the model too, that a resumed run may not change."""
    changes = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if name in OPERATIONAL or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_fields(old, new)
        else:
            changes.append(f"{name}: {old!r} -> {new!r}")
    return changes
