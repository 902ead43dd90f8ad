"""A run that was stopped, in whatever way, ends as one that was not."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from objslot.models import SMTC
from objslot.training import train
from objslot.training.checkpoint import list_checkpoints


def wait_for(condition, process, seconds=100.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


def written(out, count):
    path = out / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("\n") >= count


def same_model(one, other):
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def whole(shared_videos, tmp_path_factory, start):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(shared_videos, out, steps=40, num_workers=1)
    assert process.wait(100) == 0, process.stderr.read()
    return out


def test_killed_and_resumed_equals_uninterrupted(metrics, shared_videos, tmp_path, start, whole):
    out, fields = tmp_path / "killed", {"steps": 40, "num_workers": 1}
    for count in (5, 23):
        process = start(shared_videos, out, resume=count > 5, **fields)
        wait_for(written(out, count), process)
        process.kill()
        process.wait()
    process = start(shared_videos, out, resume=True, **fields)
    assert process.wait(100) == 0, process.stderr.read()
    assert [line["step"] for line in metrics(out)] == list(range(40))
    assert metrics(out) == metrics(whole)
    same_model(out, whole)


def test_sigterm_saves_and_leaves(metrics, shared_videos, tmp_path, start, whole):
    out, fields = tmp_path / "stopped", {"steps": 40, "num_workers": 1, "checkpoint_every": 1000}
    process = start(shared_videos, out, **fields)
    wait_for(written(out, 5), process)
    # To all its processes, as batch systems do.
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(100) == 143
    assert "resume it to go on" in process.stderr.read()
    saved = list_checkpoints(out / "checkpoints")[-1].step
    assert saved == len(metrics(out)) < 40
    process = start(shared_videos, out, resume=True, **fields)
    assert process.wait(100) == 0, process.stderr.read()
    assert metrics(out) == metrics(whole)
    same_model(out, whole)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": {"train_encoder": True}, "unfreeze_at": 3},
        {"model": {"train_encoder": True}, "unfreeze_at": 0, "recompute_encoder": True},
        {"accumulate": 2},
        {"cache_features": True},
        {"precision": "bf16"},
        {"model": {"update": "gru", "marginal": "attention"}},
    ],
    ids=["encoder unfrozen", "encoder recomputed", "accumulated", "stored features", "bf16", "gru"],
)
def test_every_kind_of_run_resumes_exactly(metrics, shared_videos, tmp_path, config, stopped_train, fields):
    settings = config(checkpoint_every=100, **fields)
    train(settings, shared_videos, tmp_path / "whole")
    out = tmp_path / "stopped"
    for steps in (1, 1):
        stopped_train(settings, shared_videos, out, steps)
    assert len(metrics(out)) == 4
    train(settings, shared_videos, out, resume=True)
    assert metrics(out) == metrics(tmp_path / "whole")
    same_model(out, tmp_path / "whole")


def test_what_a_finished_run_leaves(metrics, shared_videos, tmp_path, config):
    out = train(config(keep=2), shared_videos, tmp_path / "run")
    assert [checkpoint.step for checkpoint in list_checkpoints(out / "checkpoints")] == [4, 6]
    frozen = SMTC.load(out).state_dict()
    names = load_file(out / "checkpoints" / "step-00000006.safetensors")
    assert not any(name.startswith("model/encoder.") for name in names)
    for name, tensor in names.items():
        if name.startswith("model/"):
            assert torch.equal(tensor, frozen[name.removeprefix("model/")])
    values = json.loads((out / "config.json").read_text())
    assert values["training"]["steps"] == 6
    assert values["model"]["encoder"] == "test_training"
    before = metrics(out)
    assert train(config(keep=2), shared_videos, out, resume=True) == out
    assert metrics(out) == before


def test_a_resumed_run_takes_the_videos_it_began_with(metrics, videos, tmp_path, config, stopped_train, capfd):
    """Neither a video that is gone nor a new one shifts the others."""
    settings = config(steps=12)
    stopped_train(settings, videos, tmp_path / "moved", 4)
    shutil.copytree(tmp_path / "moved", tmp_path / "gone")
    (videos / "v2.mp4").rename(videos / "v2.kept")
    (videos / "a.mp4").write_bytes((videos / "v1.mp4").read_bytes())
    train(settings, videos, tmp_path / "moved", resume=True)
    assert "v2: the video is gone" in capfd.readouterr().err
    (videos / "a.mp4").unlink()
    train(settings, videos, tmp_path / "gone", resume=True)
    assert metrics(tmp_path / "moved") == metrics(tmp_path / "gone")


def test_torn_metrics_and_leftovers_are_mended(metrics, shared_videos, tmp_path, config, stopped_train):
    train(config(), shared_videos, tmp_path / "whole")
    out = tmp_path / "torn"
    stopped_train(config(), shared_videos, out, 3)
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "loss": 1.0}) + "\n" + '{"step": 5, "lo')
    for leftover in (
        out / "checkpoints" / ".step-00000004.safetensors.ab12",
        out / ".model.safetensors.ab12",
    ):
        leftover.write_bytes(b"torn")
    train(config(), shared_videos, out, resume=True)
    assert metrics(out) == metrics(tmp_path / "whole")
    assert not list(out.rglob("*ab12"))
