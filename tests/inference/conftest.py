"""A model and a video small enough to segment in milliseconds; makes what several tests share importable."""

import sys
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from objslot.data import Video
from objslot.models import SMTC, SMTCConfig, register_encoder

sys.path.append(str(Path(__file__).parent))


class ArrayVideo(Video):
    """Frames that are in memory: uint8 (T, H, W, 3)."""

    def __init__(self, frames: torch.Tensor, name: str = "made"):
        self.array, self.name = frames, name

    n_frames = property(lambda self: len(self.array))
    size = property(lambda self: tuple(self.array.shape[1:3]))
    fps = 25.0

    def read(self, indices):
        return self.array[list(indices)]

    def frames(self, start: int = 0):
        return iter(self.array[start:])

    def check(self):
        pass

    def identity(self):
        return self.name


@pytest.fixture
def array_video():
    return ArrayVideo


@pytest.fixture
def video():
    """19 frames, so that the last chunk has a length of its own: a bright square crosses a dark scene."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 60, (19, 40, 56, 3), generator=generator, dtype=torch.uint8)
    for t, frame in enumerate(frames):
        frame[12:28, 4 + 2 * t : 20 + 2 * t] = torch.tensor([250, 220, 40], dtype=torch.uint8)
    return ArrayVideo(frames)


@pytest.fixture
def model():
    def tiny(pretrained):
        return VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0, dynamic_img_size=True
        )

    register_encoder("test_inference", tiny)
    torch.manual_seed(3)
    return SMTC(SMTCConfig(encoder="test_inference", image_size=32, slots=3, instances=2))
