"""Stored features: what the encoder gives, written once, never torn, and as good to train on."""

import json

import pytest
import torch

from objslot.data import find_videos
from objslot.data.augment import normalise
from objslot.data.clips import resize
from objslot.errors import UserError
from objslot.models import SMTC
from objslot.training import features as features_module
from objslot.training import train
from objslot.training.distributed import World
from objslot.training.features import FeatureStore, FrozenEncoder

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def model(config):
    return SMTC(config().model)


def build(folder, model, videos, precision="fp32", limit=1.0):
    store = FeatureStore(folder, model.encoder, model.frame_size, precision)
    store.build(videos, FrozenEncoder(model.encoder, precision), ALONE, limit=limit)
    return store


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stored_features_are_those_of_the_encoder(tmp_path, model, shared_videos, precision, monkeypatch):
    monkeypatch.setattr(features_module, "_CHUNK", 4)
    videos = find_videos(shared_videos)
    store = build(tmp_path, model, videos, precision)
    for positions in ([0, 5, 9], [13, 2, 13]):
        clip = store.read(videos[1], positions)
        frames = normalise(resize(videos[1].read(positions), model.frame_size).float() / 255)
        expected = FrozenEncoder(model.encoder, precision)(frames[None])
        # float16 keeps 11 bits; in bfloat16 a product differs with the size of the batch.
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if precision == "fp32" else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(clip["keys"].float(), expected.keys[0], **tolerance)
        torch.testing.assert_close(clip["cls_attention"], expected.cls_attention[0], rtol=1e-2, atol=1e-3)
    taken = store.features({name: value[None] for name, value in clip.items()})
    assert taken.keys.shape == (1, 3, 16, 12)
    assert taken.keys.dtype == torch.float32
    assert taken.grid == (4, 4)


def test_a_frozen_encoder_takes_any_number_of_clips(model, monkeypatch):
    frames = torch.randn(5, 3, 3, 32, 32)
    whole = FrozenEncoder(model.encoder, "fp32")(frames)
    monkeypatch.setattr(features_module, "_CHUNK", 6)
    parts = FrozenEncoder(model.encoder, "fp32")(frames)
    torch.testing.assert_close(parts.keys, whole.keys)
    torch.testing.assert_close(parts.cls_attention, whole.cls_attention)
    assert not whole.keys.requires_grad


def test_features_are_stored_once_and_named_after_what_they_depend_on(tmp_path, model, videos):
    store = tmp_path / "store"
    build(store, model, find_videos(videos))
    before = files(store)
    assert len(before) == 6
    build(store, model, find_videos(videos))
    assert files(store) == before

    (videos / "v0.mp4").write_bytes((videos / "v1.mp4").read_bytes())
    build(store, model, find_videos(videos))
    assert len(files(store)) == 8
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1)
    build(store, model, find_videos(videos))
    assert len(files(store)) == 14
    assert before.items() <= files(store).items()


def test_features_that_would_not_fit_are_refused_before_any_work(tmp_path, model, shared_videos, monkeypatch):
    # 42 frames of 16 positions: 12 float16 and 1 float32 each.
    needed = 42 * 16 * (12 * 2 + 4) / 1e9
    with pytest.raises(UserError, match="features of 42 frames take.*cache_limit"):
        build(tmp_path, model, find_videos(shared_videos), limit=needed * 0.99)
    assert not files(tmp_path)
    build(tmp_path, model, find_videos(shared_videos), limit=needed * 1.01)
    assert len(files(tmp_path)) == 6


def test_a_full_disk_leaves_no_torn_file(tmp_path, model, shared_videos, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    videos = find_videos(shared_videos)
    with monkeypatch.context() as patch:
        patch.setattr(features_module.os, "fsync", full)
        store = build(tmp_path, model, videos)
    assert not files(tmp_path)
    with pytest.raises(UserError, match="No space left on device"):
        store.read(videos[0], [0])
    assert build(tmp_path, model, videos).read(videos[0], [0])["keys"].shape == (1, 16, 12)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x80\x04cos\nsystem\n(S'false'\ntR."])
def test_a_damaged_file_is_an_error(tmp_path, model, shared_videos, content):
    videos = find_videos(shared_videos)
    store = build(tmp_path, model, videos)
    for path in files(tmp_path):
        path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        store.read(videos[0], [0])


def test_training_on_stored_features(tmp_path, shared_videos, config, metrics, monkeypatch):
    settings = config(cache_features=True, cache_dir=str(tmp_path / "features"), steps=30)
    out = train(settings, shared_videos, tmp_path / "one")
    lines = metrics(out)
    assert sum(line["diversity"] for line in lines[-5:]) < 0.95 * sum(line["diversity"] for line in lines[:5])
    assert SMTC.load(out).encoder.state_dict()
    # The encoder is not needed again.
    monkeypatch.setattr(FrozenEncoder, "__call__", None)
    train(settings, shared_videos, tmp_path / "two")
    assert metrics(tmp_path / "two") == lines


def test_a_damaged_video_is_left_out(tmp_path, videos, config, capfd):
    cut = videos / "v2.mp4"
    cut.write_bytes(cut.read_bytes()[:-300])
    out = train(config(cache_features=True), videos, tmp_path / "run")
    assert "1 of 3 videos could not be used" in capfd.readouterr().err
    assert len(json.loads((out / "videos.json").read_text())["videos"]) == 3
