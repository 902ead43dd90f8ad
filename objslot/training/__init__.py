"""Train a model on unlabelled videos."""

from objslot.training.config import TrainingConfig
from objslot.training.loop import train

__all__ = ["TrainingConfig", "train"]
