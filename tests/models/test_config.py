"""The model's configuration: what it refuses, and its way through JSON."""

import json

import pytest

from objslot.errors import UserError
from objslot.models import SMTCConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder", ""),
        ("encoder", None),
        ("weights", 3),
        ("pretrained", 1),
        ("image_size", 0),
        ("image_size", (32, 32, 32)),
        ("image_size", 2.5),
        ("key_center", "median"),
        ("slots", 0),
        ("slots", True),
        ("instances", 2.0),
        ("iterations", -1),
        ("update", ["gru"]),
        ("aggregation", "max"),
        ("correspondence", "cos"),
        ("correspondence_temperature", 0),
        ("sampling", "next"),
        ("n_other", 0),
        ("full_bptt", None),
        ("eps", float("nan")),
        ("sinkhorn_iterations", 0),
        ("teacher_temperature", 0.0),
        ("marginal", "cam"),
        ("valid_similarity", -1.5),
        ("valid_threshold", 1.5),
        ("valid_area", "0.2"),
        ("semantic_weight", -1),
        ("instance_weight", float("inf")),
        ("diversity_weight", None),
        ("teacher_momentum", 2),
        ("train_encoder", "yes"),
        ("width", 0),
    ],
)
def test_wrong_values_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name}: got .*, expected ") as caught:
        SMTCConfig(**{name: value})
    assert repr(value) in str(caught.value)


def test_through_json():
    config = SMTCConfig(image_size=(96, 160), marginal="caam", width=64)
    assert SMTCConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.frame_size == (96, 160)
    assert SMTCConfig(image_size=64).frame_size == (64, 64)


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "got list"), ({"slots": 2, "colour": 1}, "'colour'"), ({"slots": "2"}, "^slots: got '2'")],
)
def test_foreign_values(values, message):
    with pytest.raises(UserError, match=message):
        SMTCConfig.from_dict(values)
