"""Saving and loading: complete, offline, whole or not at all, and clear about what is wrong."""

import json
import os

import pytest
import safetensors.torch
import torch

from objslot.errors import UserError
from objslot.models import SMTC, SMTCConfig, register_encoder
from objslot.models import files as files_module


@pytest.mark.parametrize(
    "options", [{}, {"train_encoder": True, "update": "gru", "width": 16, "image_size": (40, 32)}]
)
def test_a_loaded_model_is_the_saved_one(build, clips, tmp_path, options):
    model = build(**options)
    with torch.no_grad():
        model.teacher.slots.mu.normal_()
    model.save(tmp_path / "new" / "model")
    loaded = SMTC.load(tmp_path / "new" / "model")
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    for use_teacher in (False, True):
        expected = model.segment(model.encode(clips), use_teacher=use_teacher)
        assert torch.equal(
            loaded.segment(loaded.encode(clips), use_teacher=use_teacher).instance, expected.instance
        )
    assert os.stat(tmp_path / "new" / "model" / "model.safetensors").st_mode & 0o044


def test_loading_needs_neither_network_nor_weights_file(build, tmp_path):
    torch.save(build().encoder.model.state_dict(), tmp_path / "weights.pth")
    model = build(weights=str(tmp_path / "weights.pth"))
    model.save(tmp_path / "model")
    (tmp_path / "weights.pth").unlink()
    assert SMTC.load(tmp_path / "model").config == model.config
    timm_model = SMTC(
        SMTCConfig(encoder="vit_tiny_patch16_224.augreg_in21k", pretrained=False, image_size=32)
    )
    timm_model.save(tmp_path / "timm")
    values = json.loads((tmp_path / "timm" / "config.json").read_text())
    values["model"]["pretrained"] = True
    (tmp_path / "timm" / "config.json").write_text(json.dumps(values))
    assert SMTC.load(tmp_path / "timm").config.pretrained


def test_other_entries_of_the_configuration_stay(build, tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3}')
    model = build()
    model.save(tmp_path)
    model.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"steps": 3, "model": model.config.to_dict()}


def test_another_model_is_not_overwritten(build, tmp_path):
    build().save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="already holds another model"):
        build(slots=5).save(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(UserError, match="cannot read"):
        build().save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_write_that_fails_leaves_the_old_model_whole(build, tmp_path, monkeypatch):
    model = build()
    model.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.student.slots.mu.add_(1)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_module.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def broken(directory, **changes):
    values = json.loads((directory / "config.json").read_text())
    values["model"] |= changes
    (directory / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json is missing"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda d: (d / "config.json").write_text("{"), "cannot read .*config.json"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "cannot read .*config.json"),
        (lambda d: (d / "config.json").write_text("[1]"), "holds list"),
        (lambda d: (d / "config.json").write_text("[" * 100_000), "cannot read .*config.json"),
        (lambda d: (d / "config.json").write_text("{}"), 'no "model" entry'),
        (lambda d: (d / "config.json").write_text('{"model": 3}'), "got int, expected named fields"),
        (lambda d: broken(d, colour="red"), "unknown field 'colour'"),
        (lambda d: broken(d, slots=-3), "slots: got -3"),
        (lambda d: broken(d, encoder="never_heard_of"), "neither a model of timm nor registered"),
        (lambda d: broken(d, slots=4), "does not fit its config.json: 4 slots"),
        (lambda d: broken(d, update="gru"), "are missing"),
        (lambda d: (d / "model.safetensors").write_bytes(b"no weights"), "cannot read .*model.safetensors"),
        (
            lambda d: safetensors.torch.save_file({"x": torch.ones(1)}, d / "model.safetensors"),
            "does not fit",
        ),
    ],
)
def test_damaged_and_foreign_directories(build, tmp_path, damage, message):
    build().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        SMTC.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_weights(build, tmp_path):
    build().save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read .*model.safetensors"):
        SMTC.load(tmp_path)


def test_a_registered_encoder_is_not_asked_for_its_weights(build, tmp_path):
    model, asked = build(), []
    model.save(tmp_path)

    def factory(pretrained):
        asked.append(pretrained)
        return build().encoder.model

    register_encoder("test_asked", factory)
    broken(tmp_path, encoder="test_asked")
    SMTC.load(tmp_path)
    assert asked == [False]
