"""The model's configuration: every choice the method leaves open, with its default."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from objslot.errors import UserError

_CHOICES = {
    "key_center": ("bias", "none", "mean"),
    "update": ("residual", "gru"),
    "aggregation": ("soft", "hard", "raw_logit", "none"),
    "correspondence": ("cosine", "raw"),
    "sampling": ("other", "self"),
    "marginal": ("uniform", "caam", "attention"),
}
_POSITIVE_INTEGERS = ("slots", "instances", "iterations", "n_other", "sinkhorn_iterations")
_POSITIVE_NUMBERS = ("correspondence_temperature", "eps")
_WEIGHTS = ("semantic_weight", "instance_weight", "diversity_weight")
_FLAGS = ("pretrained", "full_bptt", "train_encoder")


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
    marginal: Literal["uniform", "caam", "attention"] = "uniform"
    """Mass of a position in the transport plan."""
    valid_similarity: float = 0.5
    """An instance is valid when the cosine to its semantics is above this."""
    valid_threshold: float = 0.5
    """A position counts towards the area of a semantics when its mask is above this."""
    valid_area: float = 0.2
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
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        for name in _POSITIVE_INTEGERS:
            _require(_is_integer(getattr(self, name)) and getattr(self, name) >= 1, self, name, "an integer >= 1")
        for name in _POSITIVE_NUMBERS:
            _require(_is_number(getattr(self, name)) and getattr(self, name) > 0, self, name, "a number > 0")
        for name in _WEIGHTS:
            _require(_is_number(getattr(self, name)) and getattr(self, name) >= 0, self, name, "a number >= 0")
        for name in _FLAGS:
            _require(isinstance(getattr(self, name), bool), self, name, "true or false")
        for name in ("valid_threshold", "valid_area", "teacher_momentum"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 <= value <= 1, self, name, "a number between 0 and 1")
        value = self.valid_similarity
        _require(_is_number(value) and -1 <= value <= 1, self, "valid_similarity", "a number between -1 and 1")
        _require(isinstance(self.encoder, str) and self.encoder != "", self, "encoder", "the name of an encoder")
        _require(self.weights is None or isinstance(self.weights, str), self, "weights", "the path of a file")
        _require(self.width is None or (_is_integer(self.width) and self.width >= 1), self, "width",
                 "an integer >= 1, or none")
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        _require(len(size) == 2 and all(_is_integer(side) and side >= 1 for side in size), self, "image_size",
                 "a number of pixels or a pair of them")

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
        unknown = sorted(str(name) for name in set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"model configuration: unknown field {unknown[0]!r} ({len(unknown)} in all); "
                            "was it written by another version?")
        return cls(**values)


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _require(holds: bool, config: SMTCConfig, name: str, expected: str):
    if not holds:
        raise UserError(f"{name}: got {getattr(config, name)!r}, expected {expected}")
