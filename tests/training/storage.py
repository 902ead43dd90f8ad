"""Trains on a disk that fills up or cannot be written: `python storage.py DATA FOLDER`, in a mount namespace.

The namespace is that of this process: what it mounts on FOLDER is seen by no other and gone when it ends.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from objslot.errors import UserError
from objslot.models import SMTC
from objslot.training import train
from objslot.training.checkpoint import list_checkpoints

sys.path.append(str(Path(__file__).parent))
from run import make_config


def mount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", *options, str(folder)], check=True)


def refused(settings, data, out, **keywords) -> str:
    try:
        train(settings, data, out, **keywords)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("the run came to its end")


def assert_finishes(settings, data, folder: Path) -> None:
    train(settings, data, folder / "run", resume=True)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(settings.steps))
    SMTC.load(folder / "run")


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def full_between_checkpoints(data: str, folder: Path) -> None:
    settings = make_config(steps=30, checkpoint_every=25)
    follow, calls = SMTC.update_teacher, [0]

    def follow_and_fill(model):
        follow(model)
        calls[0] += 1
        if calls[0] == 5:
            fill(folder / "other")

    SMTC.update_teacher = follow_and_fill
    text = refused(settings, data, folder / "run")
    SMTC.update_teacher = follow
    assert "metrics.jsonl" in text and "No space left on device" in text, text
    (folder / "other").unlink()
    assert_finishes(settings, data, folder)


def full_at_a_checkpoint(data: str, folder: Path) -> None:
    settings = make_config(steps=30, checkpoint_every=5)
    follow, calls = SMTC.update_teacher, [0]

    def follow_and_fill(model):
        follow(model)
        calls[0] += 1
        if calls[0] == 10:
            fill(folder / "other")
            # Room for metrics, not for a checkpoint.
            os.truncate(folder / "other", (folder / "other").stat().st_size - 16384)

    SMTC.update_teacher = follow_and_fill
    text = refused(settings, data, folder / "run")
    SMTC.update_teacher = follow
    assert "step 5 is whole" in text, text
    assert [checkpoint.step for checkpoint in list_checkpoints(folder / "run" / "checkpoints")] == [0, 5]
    (folder / "other").unlink()
    assert_finishes(settings, data, folder)


def too_small_for_one(data: str, folder: Path) -> None:
    fill(folder / "other")
    os.truncate(folder / "other", (folder / "other").stat().st_size - 32768)
    text = refused(make_config(), data, folder / "run")
    assert "cannot be written" in text, text
    assert not (folder / "run" / "metrics.jsonl").read_text()


def read_only(data: str, folder: Path) -> None:
    settings = make_config(steps=8)
    train(make_config(steps=8), data, folder / "run")
    held = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    mount(folder, "-o", "remount,ro")
    text = refused(settings, data, folder / "new")
    assert "cannot be written as an output folder (Read-only file system)" in text, text
    text = refused(settings, data, folder / "run", resume=True)
    assert "Read-only file system" in text, text
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == held
    # What is there can still be used.
    SMTC.load(folder / "run")


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[2])
    for case in (full_between_checkpoints, full_at_a_checkpoint, too_small_for_one, read_only):
        print(case.__name__, file=sys.stderr)
        mount(where, "-t", "tmpfs", "-o", "size=2m", "none")
        case(sys.argv[1], where)
        subprocess.run(["umount", "--lazy", where], check=True)
