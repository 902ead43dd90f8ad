"""Runs small enough to take a second or two: tiny videos, a tiny encoder."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from objslot.models import SMTC
from objslot.training import train

RUN = Path(__file__).with_name("run.py")
_specification = importlib.util.spec_from_file_location("training_run", RUN)
run_module = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(run_module)
# Timing apart, what a step writes down is the same however the run was carried out.
TIMING = {"seconds", "seconds_waiting"}


def _write_video(path: Path, seed: int, n_frames: int = 14) -> Path:
    """A textured square that wanders over a textured ground."""
    random = np.random.default_rng(seed)
    ground, patch = random.integers(0, 255, (40, 40, 3)), random.integers(0, 255, (14, 14, 3))
    with av.open(str(path), "w", options={"movflags": "faststart"}) as output:
        stream = output.add_stream("libx264", rate=24, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = 40, 40, "yuv420p"
        for number in range(n_frames):
            pixels = ground.astype(np.uint8)
            row, column = (number + seed) % 26, (2 * number) % 26
            pixels[row : row + 14, column : column + 14] = patch
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def write_video():
    """Writes one video: path, seed, n_frames."""
    return _write_video


@pytest.fixture
def config():
    """Makes a TrainingConfig of the tiny model."""
    return run_module.make_config


@pytest.fixture(scope="session")
def shared_videos(tmp_path_factory):
    """A folder of three videos that no test changes."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        _write_video(folder / f"v{number}.mp4", number)
    return folder


@pytest.fixture
def videos(tmp_path):
    """A folder of three videos of the test's own."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(3):
        _write_video(folder / f"v{number}.mp4", number)
    return folder


@pytest.fixture(scope="session")
def start():
    """Starts a run in a process of its own."""
    started = []

    def start(data, out, *, resume=False, launcher=(), **fields) -> subprocess.Popen:
        words = [sys.executable, *launcher, str(RUN), str(data), str(out), "resume" if resume else "new"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*words, json.dumps(fields)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stderr.close()


@pytest.fixture
def stopped_train(monkeypatch):
    """Trains, resuming where it can, and presses Ctrl-C at the end of step ``steps``: one more is done."""

    def stopped_train(settings, data, out, steps):
        done = 0
        follow = SMTC.update_teacher

        def press(model):
            nonlocal done
            follow(model)
            done += 1
            if done == steps:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(SMTC, "update_teacher", press)
            train(settings, data, out, resume=True)

    return stopped_train


@pytest.fixture(scope="session")
def metrics():
    """The steps a run wrote down, without their timing."""

    def read(out: Path) -> list[dict]:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]

    return read
