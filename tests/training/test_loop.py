"""What a run does with bad input, full disks, losses that are not finite, and videos that break under it."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from objslot.data.clips import TooShort
from objslot.errors import UserError
from objslot.models import SMTC
from objslot.training import checkpoint as checkpoints
from objslot.training import train
from objslot.training.checkpoint import list_checkpoints
from objslot.training.config import changed_fields
from objslot.training.guards import UnusableVideos


def refused(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 2.5),
        ("batch_size", True),
        ("frames", 1),
        ("stride", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("weight_decay", -0.1),
        ("unfreeze_at", -1),
        ("precision", "fp16"),
        ("num_workers", -1),
        ("max_unreadable", 1.5),
        ("device", "gpu"),
        ("accumulate", 3),
        ("seed", -1),
    ],
)
def test_a_bad_field_is_named(config, field, value):
    text = refused(lambda: config(**{field: value}))
    assert text.startswith(f"{field}: got {value!r}")
    assert "expected" in text


def test_fields_that_do_not_go_together(config):
    assert "n_other" in refused(lambda: config(model={"n_other": 3}))
    assert "cache_features" in refused(lambda: config(model={"train_encoder": True}, cache_features=True))
    assert "recompute_encoder" in refused(lambda: config(recompute_encoder=True))


def test_learning_rate_falls_to_a_tenth_along_a_cosine(config):
    factor = config(steps=100).learning_rate_factor
    assert factor(0) == pytest.approx(1)
    assert factor(50) == pytest.approx(0.55)
    assert factor(100) == pytest.approx(0.1)
    assert all(factor(step) > factor(step + 1) for step in range(100))


def test_changed_fields_names_what_bears_on_the_result(config):
    before = config().to_dict()
    assert changed_fields(before, config(num_workers=3, log_every=1, keep=9).to_dict()) == []
    changes = changed_fields(before, config(lr=0.5, model={"slots": 5}).to_dict())
    assert changes == ["lr: 0.01 -> 0.5", "slots: 3 -> 5"]


def test_training_learns(shared_videos, tmp_path, config, metrics):
    train(config(steps=60, checkpoint_every=100), shared_videos, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    for term, share in (("loss", 0.97), ("diversity", 0.8)):
        assert sum(line[term] for line in lines[-10:]) < share * sum(line[term] for line in lines[:10])


def test_what_a_step_writes_down(shared_videos, tmp_path, config):
    out = train(config(steps=2), shared_videos, tmp_path / "run")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        terms = line["semantic"] + line["instance"] + line["diversity"]
        assert line["loss"] == pytest.approx(terms, rel=1e-5)
        assert line["grad_norm"] > 0
        assert line["skipped"] is False
        assert {"valid_share", "fusion_ratio", "lr"} <= line.keys()
        assert 0 <= line["seconds_waiting"] <= line["seconds"]


def test_the_optimiser_leaves_teacher_and_encoder_alone(shared_videos, tmp_path, config):
    settings = config(steps=3, checkpoint_every=3)
    out = train(settings, shared_videos, tmp_path / "run")
    first, last = (load_file(c.path) for c in list_checkpoints(out / "checkpoints"))
    moved = {name for name in first if name.startswith("model/") and not torch.equal(first[name], last[name])}
    assert moved
    assert all(name.startswith(("model/student.", "model/teacher.", "model/teacher_updates")) for name in moved)
    assert not any("teacher" in name for name in last if name.startswith("optimizer/"))


@pytest.mark.parametrize("fields", [{"accumulate": 2}, {"accumulate": 4}, {"recompute_encoder": True}])
def test_gradients_of_a_batch_in_parts_or_computed_twice_are_the_same(shared_videos, tmp_path, config, fields):
    train_encoder = "recompute_encoder" in fields
    common = {"steps": 1, "batch_size": 4, "model": {"train_encoder": train_encoder}, "unfreeze_at": 0}
    moments = []
    for name, changes in (("whole", {}), ("other", fields)):
        train(config(**common, **changes), shared_videos, tmp_path / name)
        tensors = load_file(list_checkpoints(tmp_path / name / "checkpoints")[-1].path)
        # After one step AdamW's first moment is a tenth of the gradient.
        moments.append({key: value for key, value in tensors.items() if key.endswith("/exp_avg")})
    assert any("encoder" in key for key in moments[0]) == train_encoder
    # The bias of the slots' norm has a gradient of nothing but rounding, so the scale is that of the whole.
    scale = torch.cat([moment.flatten() for moment in moments[0].values()]).norm()
    for key, expected in moments[0].items():
        assert (moments[1][key] - expected).norm() < 1e-5 * scale, key


def test_a_folder_that_holds_something_else_is_refused(shared_videos, tmp_path, config):
    out = train(config(steps=2), shared_videos, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    assert "holds a run already" in refused(lambda: train(config(steps=2), shared_videos, out))
    changed = config(steps=9, lr=0.5, model={"slots": 4})
    text = refused(lambda: train(changed, shared_videos, out, resume=True))
    for name in ("steps: 2 -> 9", "lr: 0.01 -> 0.5", "slots: 3 -> 4"):
        assert name in text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before

    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"mine")
    assert "something else" in refused(lambda: train(config(), shared_videos, other))
    assert (other / "model.safetensors").read_bytes() == b"mine"
    file = tmp_path / "file"
    file.touch()
    assert "cannot be written" in refused(lambda: train(config(), shared_videos, file))


def test_two_runs_on_one_folder(shared_videos, tmp_path, config):
    holder = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    out = tmp_path / "run"
    out.mkdir()
    process = subprocess.Popen([sys.executable, "-c", holder, str(out / ".lock")], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert "another run" in refused(lambda: train(config(), shared_videos, out))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    train(config(steps=1), shared_videos, out)


def test_a_folder_that_cannot_be_made(shared_videos, config):
    assert "cannot be written" in refused(lambda: train(config(), shared_videos, "/proc/objslot-run"))


def test_a_full_disk_leaves_the_old_checkpoint_whole(shared_videos, tmp_path, config, monkeypatch, metrics):
    train(config(), shared_videos, tmp_path / "whole")

    def half_written(tensors, path, header):
        if json.loads(header["state"])["step"] == 4:
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, header)

    out = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", half_written)
        text = refused(lambda: train(config(), shared_videos, out))
    assert "No space left on device" in text
    assert "checkpoint of step 2 is whole" in text
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-00000000.safetensors", "step-00000002.safetensors"]
    train(config(), shared_videos, out, resume=True)
    assert metrics(out) == metrics(tmp_path / "whole")


def test_a_disk_too_small_for_a_checkpoint_is_found_before_the_first_step(shared_videos, tmp_path, config, monkeypatch):
    def full(tensors, path, header):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    assert "No space left" in refused(lambda: train(config(), shared_videos, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("content", [b"", b"\x80\x04torn", b"\xff" * 64], ids=["empty", "pickle", "noise"])
def test_a_damaged_checkpoint_is_an_error(shared_videos, tmp_path, config, content):
    out = train(config(steps=2), shared_videos, tmp_path / "run")
    list_checkpoints(out / "checkpoints")[-1].path.write_bytes(content)
    assert "not a checkpoint that can be read" in refused(
        lambda: train(config(steps=2), shared_videos, out, resume=True)
    )


def test_a_checkpoint_of_another_model_is_an_error(shared_videos, tmp_path, config):
    out = train(config(steps=2), shared_videos, tmp_path / "run")
    other = train(config(steps=2, model={"slots": 5}), shared_videos, tmp_path / "other")
    name = "checkpoints/step-00000002.safetensors"
    (out / name).write_bytes((other / name).read_bytes())
    assert "of another model" in refused(lambda: train(config(steps=2), shared_videos, out, resume=True))


def spoil(monkeypatch, bad_steps):
    """Losses of the given calls are not finite."""
    forward, calls = SMTC.forward, [0]

    def spoiled(self, *arguments, **keywords):
        terms = forward(self, *arguments, **keywords)
        if calls[0] in bad_steps:
            terms["loss"] = terms["loss"] * float(bad_steps[calls[0]])
        calls[0] += 1
        return terms

    monkeypatch.setattr(SMTC, "forward", spoiled)


def test_a_step_that_is_not_finite_is_skipped_and_counted(shared_videos, tmp_path, config, monkeypatch, metrics):
    spoil(monkeypatch, {2: "nan", 4: "inf"})
    out = train(config(checkpoint_every=1, keep=9), shared_videos, tmp_path / "run")
    lines = metrics(out)
    assert [line["skipped"] for line in lines] == [False, False, True, False, True, False]
    assert lines[2]["loss"] is None
    weights = [load_file(c.path) for c in list_checkpoints(out / "checkpoints")]
    for before in (2, 4):
        assert all(torch.equal(weights[before][name], weights[before + 1][name]) for name in weights[before])
    assert all(bool(tensor.isfinite().all()) for tensor in weights[-1].values())


def test_losses_that_stay_not_finite_stop_the_run(shared_videos, tmp_path, config, monkeypatch, metrics):
    spoil(monkeypatch, dict.fromkeys(range(1, 9), "nan"))
    out = tmp_path / "run"
    text = refused(lambda: train(config(steps=9, max_nonfinite=3), shared_videos, out))
    assert "3 steps in a row, to step 3" in text
    assert len(metrics(out)) == 4
    batch = load_file(out / "failed-step-00000003.safetensors")
    assert batch["frames"].shape == (2, 3, 3, 32, 32)
    assert batch["frames"].dtype == torch.uint8


def test_bad_data_is_one_clear_error(tmp_path, config, videos):
    def run(data):
        return train(config(), data, tmp_path / f"run-{len(list(tmp_path.iterdir()))}")

    assert "no such file or folder" in refused(lambda: run(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no video found" in refused(lambda: run(empty))
    cut = videos / "v0.mp4"
    cut.write_bytes(cut.read_bytes()[:-300])
    assert "v0.mp4: the video is damaged or cut off" in refused(lambda: run(cut))


def test_a_video_of_one_frame(tmp_path, config, write_video, capfd):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "short.mp4", 0, n_frames=1)
    text = refused(lambda: train(config(), folder, tmp_path / "none"))
    assert "no video is left to train on" in text
    assert "1 frame, too short for clips of 3" in text
    write_video(folder / "long.mp4", 1)
    capfd.readouterr()
    train(config(), folder, tmp_path / "one")
    printed = capfd.readouterr().err
    assert printed.count("skipping a video") == 1
    assert "1 of 2 videos could not be used" in printed


def test_videos_that_break_during_a_run_are_skipped_and_counted(
    videos, tmp_path, config, monkeypatch, capfd, write_video
):
    write_video(videos / "v3.mp4", 3)
    follow, steps = SMTC.update_teacher, [0]

    def break_one(model):
        follow(model)
        steps[0] += 1
        if steps[0] == 4:
            (videos / "v1.mp4").unlink()
            (videos / "v2.mp4").write_bytes((videos / "v2.mp4").read_bytes()[:-600])
        if steps[0] == 20:
            (videos / "v0.mp4").unlink()

    monkeypatch.setattr(SMTC, "update_teacher", break_one)
    train(config(steps=16), videos, tmp_path / "run")
    printed = capfd.readouterr().err
    assert printed.count("skipping a video") == 2
    assert "2 of 4 videos could not be used" in printed

    for number in (1, 2):
        write_video(videos / f"v{number}.mp4", number)
    steps[0] = 0
    text = refused(lambda: train(config(steps=60), videos, tmp_path / "stopped"))
    assert "3 of 4 videos cannot be read, more than max_unreadable = 0.5" in text


def test_videos_are_counted_once():
    said = []
    tally = UnusableVideos(5, 0.2, said.append)
    for _ in range(2):
        tally.note(0, TooShort("short"))
        tally.note(1, UserError("torn"))
    assert (len(tally), tally.unreadable, len(said)) == (2, 1, 2)
    with pytest.raises(UserError, match="2 of 5 videos cannot be read.*torn"):
        tally.note(2, UserError("gone"))


def test_no_signal_handler_is_left_behind(shared_videos, tmp_path, config):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(config(steps=1), shared_videos, tmp_path / "run")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
