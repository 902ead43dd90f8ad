"""Models small enough to test in milliseconds."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from objslot.models import SMTC, SMTCConfig, register_encoder


def _tiny_vit(pretrained: bool):
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0, dynamic_img_size=True
    )


@pytest.fixture
def build():
    """Makes an SMTC on a 4 x 4 grid, always the same one, whose instances all count as valid."""
    register_encoder("test_tiny", _tiny_vit)

    def build(**changes) -> SMTC:
        torch.manual_seed(1)
        settings = {"encoder": "test_tiny", "image_size": 32, "slots": 3, "instances": 2}
        settings |= {"valid_similarity": -1.0, "valid_threshold": 0.0, "valid_area": 0.0}
        return SMTC(SMTCConfig(**(settings | changes)))

    return build


@pytest.fixture
def clips():
    """Two clips of three frames."""
    return torch.randn(2, 3, 3, 32, 32)
