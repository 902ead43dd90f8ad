"""The model: encoders, temporal correspondence and SMTC (semantics meets temporal correspondence)."""

import torch

from objslot.errors import UserError
from objslot.models.light import compiler_on_demand

try:
    with compiler_on_demand():
        import timm  # noqa: F401
except Exception as error:  # a torchvision built for another torch fails with RuntimeError, not ImportError
    raise UserError(
        f"the encoders need timm, which does not load beside torch {torch.__version__} ({error}); install "
        "timm and the torchvision built for this torch"
    ) from error

from objslot.models.branch import IterationMaps, SlotMaps
from objslot.models.config import SMTCConfig
from objslot.models.encoder import Encoder, FrameFeatures
from objslot.models.registry import build_encoder, register_encoder
from objslot.models.smtc import SMTC
from objslot.models.tiny_encoder import NAME, create_tiny_encoder

register_encoder(NAME, create_tiny_encoder)

__all__ = [
    "SMTC",
    "Encoder",
    "FrameFeatures",
    "IterationMaps",
    "SMTCConfig",
    "SlotMaps",
    "build_encoder",
    "register_encoder",
]
