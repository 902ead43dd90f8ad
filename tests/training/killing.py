"""Kills runs at random moments, again and again: `python killing.py DATA FOLDER KILLS SEED FIELDS`.

Half of the moments are times, half are file operations, just before they are done. After every kill what is on disk
is checked; a run that comes to its end is compared with one that nothing stopped. Prints what was done as JSON.
Every run is forked from this process, which has imported everything, so that a run takes a second and not ten.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors import safe_open

from objslot.training import train
from objslot.training.checkpoint import list_checkpoints

sys.path.append(str(Path(__file__).parent))
from run import make_config

TIMING = {"seconds", "seconds_waiting"}

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir")


def main(data: str, folder: str, kills: str, seed: str, fields: str) -> None:
    torch.set_num_threads(1)
    draw = random.Random(int(seed))
    settings = make_config(**json.loads(fields))
    folder = Path(folder)
    whole, out = folder / "whole", folder / "run"

    began = time.monotonic()
    operations = count_operations(settings, data, whole)
    duration = time.monotonic() - began
    found = {"kills": 0, "finished": 0, "before the first checkpoint": 0, "steps": set()}
    while found["kills"] < int(kills):
        by_time = draw.random() < 0.5
        moment = {"seconds": draw.uniform(0, duration)} if by_time else {"operation": draw.randrange(operations)}
        if run(settings, data, out, **moment):
            finish(whole, out, settings)
            found["finished"] += 1
        else:
            found["kills"] += 1
            step = check(out)
            found["steps"].add(step)
            found["before the first checkpoint"] += step < 0
    if out.exists():
        assert run(settings, data, out)
        finish(whole, out, settings)
        found["finished"] += 1
    print(json.dumps({**found, "steps": sorted(found["steps"]), "operations": operations}))


def run(settings, data, out, *, seconds=None, operation=None) -> bool:
    """Whether the run, begun or resumed in a process of its own, came to its end before it was killed."""
    child = os.fork()
    if child == 0:
        try:
            if operation is not None:
                sys.addaudithook(Countdown(operation, out))
            with open(os.devnull, "w") as sys.stderr:
                train(settings, data, out, resume=True)
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
    deadline = time.monotonic() + (100 if seconds is None else seconds)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            assert seconds is not None, "the run hangs"
        time.sleep(0.002)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, f"the run does not go on; {out} holds {sorted(map(str, out.rglob('*')))}"
    return not killed


class Countdown:
    """An audit hook that kills its process just before file operation ``left`` under ``folder``."""

    def __init__(self, left: int, folder: Path):
        self.left = left
        self.folder = str(folder)

    def __call__(self, event, arguments):
        if event in OPERATIONS and str(arguments[0]).startswith(self.folder):
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1


def count_operations(settings, data, out) -> int:
    """Run to the end without a kill; how many operations `Countdown` saw."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        countdown = Countdown(10**9, out)
        sys.addaudithook(countdown)
        with open(os.devnull, "w") as sys.stderr:
            train(settings, data, out)
        os.write(writer, str(10**9 - countdown.left).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the run without a kill fails"
    return int(os.read(reader, 64))


def check(out: Path) -> int:
    """All that is on disk under its own name is whole; returns the newest checkpoint's step, or -1."""
    checkpoints = list_checkpoints(out / "checkpoints")
    files = [checkpoint.path for checkpoint in checkpoints]
    files += [path for path in [out / "model.safetensors"] if path.exists()]
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert all(bool(file.get_tensor(name).isfinite().all()) for name in file.keys()), path
    for path in out.glob("*.json"):
        json.loads(path.read_text())
    newest = checkpoints[-1].step if checkpoints else -1
    metrics = out / "metrics.jsonl"
    if metrics.exists():
        # What a kill may tear is the line that is being written.
        text = metrics.read_text()
        steps = [json.loads(line)["step"] for line in text[: text.rfind("\n") + 1].splitlines()]
        assert steps == list(range(len(steps))), steps
        assert len(steps) >= newest, (steps, newest)
    else:
        assert newest < 0
    return newest


def finish(whole: Path, out: Path, settings) -> None:
    """A run that was killed on its way ends as the one that was not, and leaves no temporary file."""
    assert check(out) == settings.steps
    assert metrics(out) == metrics(whole)
    for name in ("model.safetensors", f"checkpoints/step-{settings.steps:08d}.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (whole, out)]
    # Stored features are shared between runs: what is half written there is cleared after a day.
    left = names[1] - names[0]
    assert names[0] <= names[1] and all(name.startswith("features/") and ".writing-" in name for name in left), left
    shutil.rmtree(out)


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


if __name__ == "__main__":
    main(*sys.argv[1:6])
