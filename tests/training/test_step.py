"""What a step decides by its configuration and its machine."""

import pytest
import torch
from timm.layers import Attention

from objslot.models import SMTC, SMTCConfig
from objslot.training import TrainingConfig
from objslot.training import step as steps


@pytest.mark.parametrize(
    "learns, precision, tiles, most, products",
    [
        (True, "bf16", True, 16, True),
        (False, "bf16", True, 16, False),
        (True, "fp32", True, 16, False),
        (True, "bf16", False, 16, False),
        (True, "bf16", True, 15, False),
    ],
)
def test_only_where_it_is_faster_a_learning_encoder_attends_by_products(
    monkeypatch, learns, precision, tiles, most, products
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(steps, "MOST_POSITIONS", most)
    model = SMTC(
        SMTCConfig(encoder="test_vit.r160_in1k", pretrained=False, image_size=64, train_encoder=learns)
    )
    steps.TrainingStep(model, TrainingConfig(model=model.config, precision=precision))

    def by_products(encoder):
        return [not part.fused_attn for part in encoder.modules() if type(part) is Attention]

    assert set(by_products(model.encoder)) == {products}
    if learns:
        assert not any(by_products(model.teacher_encoder))
