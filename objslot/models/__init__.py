"""The model: encoders, temporal correspondence and SMTC (semantics meets temporal correspondence)."""

from objslot.models.config import SMTCConfig
from objslot.models.encoder import Encoder, FrameFeatures, register_encoder
from objslot.models.smtc import SMTC, SlotMaps

__all__ = ["SMTC", "Encoder", "FrameFeatures", "SMTCConfig", "SlotMaps", "register_encoder"]
