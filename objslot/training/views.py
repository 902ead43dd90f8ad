"""What the student and the teacher see of a batch of clips: frames to encode, or features."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from objslot.data.augment import augment, normalise
from objslot.models import SMTC
from objslot.models.encoder import FrameFeatures
from objslot.training.config import TrainingConfig
from objslot.training.features import FeatureStore, FrozenEncoder

View: TypeAlias = Tensor | FrameFeatures


class Views:
    """Turns a batch of clips into the two views.

    Frames are augmented for each view and, where the encoder is frozen, encoded without a gradient, both views in
    one pass. Stored features are the same for both.

    Attributes: ``encode``, the `FrozenEncoder`, or None where the encoder is trained.
    """

    def __init__(self, model: SMTC, config: TrainingConfig, device: torch.device | str = "cpu"):
        self.device = device
        self.encode: FrozenEncoder | None = None
        self.store: FeatureStore | None = None
        if not config.model.train_encoder:
            self.encode = FrozenEncoder(model.encoder, config.precision, config.compile)

    def __call__(self, batch: dict[str, Tensor]) -> tuple[View, View]:
        """Views of "frames", uint8 (B, T, 3, H, W), as "student" and "teacher" say; or of what the store holds."""
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        if self.store is not None:
            features = self.store.features(batch)
            return features, features
        frames = batch["frames"].float() / 255
        student, teacher = (normalise(augment(frames, batch[view])) for view in ("student", "teacher"))
        if self.encode is None:
            return student, teacher
        found = self.encode(torch.cat([student, teacher]))
        keys, attention = found.keys.chunk(2), found.cls_attention
        attentions = (None, None) if attention is None else attention.chunk(2)
        return (
            FrameFeatures(keys[0], found.tokens, attentions[0], found.grid),
            FrameFeatures(keys[1], found.tokens, attentions[1], found.grid),
        )
