"""The model's configuration: every choice the method leaves open, with its default."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from objslot.errors import UserError


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_count(value) -> bool:
    return _is_integer(value) and value >= 1


def _is_size(value) -> bool:
    return _is_count(value) or (isinstance(value, tuple) and len(value) == 2 and all(map(_is_count, value)))


def _one_of(*choices):
    return lambda value: value in choices, f"one of {', '.join(choices)}"


_TEXT = (lambda value: isinstance(value, str) and value != "", "a name that is not empty")
_PATH = (lambda value: value is None or (isinstance(value, str) and value != ""), "the path of a file")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_COUNT = (_is_count, "an integer of at least 1")
_POSITIVE = (lambda value: _is_number(value) and value > 0, "a number above 0")
_WEIGHT = (lambda value: _is_number(value) and value >= 0, "a number of at least 0")
_SHARE = (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")

_CHECKS = {
    "encoder": _TEXT,
    "weights": _PATH,
    "pretrained": _FLAG,
    "image_size": (_is_size, "a number of pixels, or a pair (height, width) of them"),
    "key_center": _one_of("bias", "none", "mean"),
    "slots": _COUNT,
    "instances": _COUNT,
    "iterations": _COUNT,
    "update": _one_of("residual", "gru"),
    "aggregation": _one_of("soft", "hard", "raw_logit", "none"),
    "correspondence": _one_of("cosine", "raw"),
    "correspondence_temperature": _POSITIVE,
    "sampling": _one_of("other", "self"),
    "n_other": _COUNT,
    "full_bptt": _FLAG,
    "eps": _POSITIVE,
    "sinkhorn_iterations": _COUNT,
    "teacher_temperature": _POSITIVE,
    "marginal": _one_of("uniform", "caam", "attention"),
    "valid_similarity": (lambda value: _is_number(value) and -1 <= value <= 1, "a number from -1 to 1"),
    "valid_threshold": _SHARE,
    "valid_area": _SHARE,
    "semantic_weight": _WEIGHT,
    "instance_weight": _WEIGHT,
    "diversity_weight": _WEIGHT,
    "teacher_momentum": _SHARE,
    "train_encoder": _FLAG,
    "width": (lambda value: value is None or _is_count(value), "an integer of at least 1, or none"),
}


@dataclass(frozen=True)
class SMTCConfig:
    """What a model is made of and how its losses are computed.

    Raises `UserError` on construction, naming the field, what came and what was expected.
    """

    encoder: str = "vit_small_patch16_224.dino"
    """Name of a timm ViT or ResNet, or of an encoder registered with `register_encoder`."""
    weights: str | None = None
    """Local file with the encoder's weights: safetensors or a PyTorch state dict."""
    pretrained: bool = True
    """Without `weights`: download the encoder's published weights; off means random weights."""
    image_size: int | tuple[int, int] = 256
    """Side, or (height, width), of training frames in pixels, cut to a multiple of the patch."""
    key_center: Literal["bias", "none", "mean"] = "bias"
    """What is subtracted from the keys: the key bias of the layer, nothing, or each frame's mean key."""
    slots: int = 16
    """Number of semantics N, the slots of the first stage."""
    instances: int = 4
    """Number of instances P of each semantics, the slots of the second stage, in training."""
    iterations: int = 3
    """Slot attention iterations I of each stage."""
    update: Literal["residual", "gru"] = "residual"
    """How a slot takes its update."""
    aggregation: Literal["soft", "hard", "raw_logit", "none"] = "soft"
    """What the second stage is masked with: semantic mask, its argmax, logit above 0.3, or nothing."""
    correspondence: Literal["cosine", "raw"] = "cosine"
    """Cosine over the temperature and a LayerNorm after fusion, or raw dot products without."""
    correspondence_temperature: float = 0.1
    """Temperature of the cosine correspondence."""
    sampling: Literal["other", "self"] = "other"
    """Correspond a frame to random other frames of its clip, or to itself."""
    n_other: int = 1
    """How many other frames, their maps averaged."""
    full_bptt: bool = False
    """Back-propagate through every slot attention iteration, not only the last."""
    eps: float = 0.05
    """Entropic regularisation of the transport plan."""
    sinkhorn_iterations: int = 3
    """Sinkhorn iterations of the transport plan."""
    teacher_temperature: float = 0.7
    """Temperature of the teacher's softmax over semantics in the alignment: 1 in the paper, sharper below."""
    marginal: Literal["uniform", "caam", "attention"] = "uniform"
    """Mass of a position in the transport plan."""
    valid_similarity: float = 0.5
    """An instance is valid when the cosine to its semantics is above this."""
    valid_threshold: float = 0.3
    """A position counts towards the area of a semantics when its mask is above this."""
    valid_area: float = 0.02
    """A semantics is valid when its area, a share of the frame, is above this."""
    semantic_weight: float = 1.0
    """Weight of the semantic alignment loss."""
    instance_weight: float = 1.0
    """Weight of the instance alignment loss."""
    diversity_weight: float = 1.0
    """Weight of the diversity loss."""
    teacher_momentum: float = 0.999
    """Share of the old teacher in the new one, at every step."""
    train_encoder: bool = False
    """Train the encoder too; the teacher then has an encoder of its own."""
    width: int | None = None
    """Width of the slots; the encoder's own when not given, else a projection is learned."""

    def __post_init__(self):
        if isinstance(self.image_size, list):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            holds, expected = _CHECKS[field.name]
            if not holds(value):
                raise UserError(f"{field.name}: got {value!r}, expected {expected}")

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of training frames in pixels, before they are cut to a multiple of the patch."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "SMTCConfig":
        """The configuration `to_dict` gave; raises `UserError` on anything else."""
        if not isinstance(values, dict):
            raise UserError(f"model configuration: got {type(values).__name__}, expected named fields")
        unknown = sorted(map(str, set(values) - set(_CHECKS)))
        if unknown:
            raise UserError(
                f"model configuration: unknown field {unknown[0]!r} ({len(unknown)} in all); "
                "was it written by another version?"
            )
        return cls(**values)
