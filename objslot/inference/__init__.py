"""Inference: objects in videos with a trained model, and the baselines it is compared with."""

from objslot.inference.baselines import colour_null, frozen_backbone
from objslot.inference.segment import segment_video

__all__ = ["colour_null", "frozen_backbone", "segment_video"]
