"""Disks that are full or cannot be written, clocks that go back, and folders that are taken."""

import itertools
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from objslot.errors import UserError
from objslot.models import SMTC
from objslot.training import guards, train
from objslot.training.checkpoint import list_checkpoints
from objslot.training.folder import MetricsFile, RunFolder

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def test_a_disk_that_fills_up_or_cannot_be_written(shared_videos, tmp_path):
    probe = [*NAMESPACE, "mount", "-t", "tmpfs", "none", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    script = [sys.executable, Path(__file__).with_name("storage.py"), shared_videos, tmp_path]
    done = subprocess.run([*NAMESPACE, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.iterdir())


def test_a_file_that_may_not_grow(shared_videos, tmp_path, config):
    """Where no file system can be mounted: the limit of a file's size is met by real writes too."""
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
    try:
        with pytest.raises(UserError, match="model.safetensors cannot be written .*[Ff]ile too large"):
            train(config(), shared_videos, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (out / "metrics.jsonl").read_text()
    train(config(), shared_videos, out, resume=True)
    assert list_checkpoints(out / "checkpoints")[-1].step == 6


def test_metrics_on_a_full_device(tmp_path):
    metrics = MetricsFile(Path("/dev/full"), tmp_path)
    with pytest.raises(UserError, match="/dev/full cannot be written .No space left on device"):
        metrics.write({"step": 0})
    metrics.close()


def test_a_failed_batch_that_cannot_be_kept_is_said(monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(guards, "save_file", full)
    assert "could not be written" in guards.save_failed_batch(tmp_path, 3, {}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fields", [{}, {"cache_features": True}], ids=["pixels", "stored features"])
def test_a_clock_that_goes_back(shared_videos, tmp_path, config, metrics, monkeypatch, stopped_train, fields):
    settings = config(**fields)
    train(settings, shared_videos, tmp_path / "whole")
    out = tmp_path / "run"
    stopped_train(settings, shared_videos, out, 3)
    # The disk remembers times to come, what was written last the earliest; this process counts backwards.
    for age, path in enumerate(sorted(out.rglob("*"))):
        os.utime(path, (4e9 - age, 4e9 - age))
    steps = [checkpoint.step for checkpoint in list_checkpoints(out / "checkpoints")]
    assert len(steps) > 1 and steps == sorted(steps)
    for name, start in (("time", 1e9), ("perf_counter", 1e6)):
        count = itertools.count()
        monkeypatch.setattr(f"time.{name}", lambda start=start, count=count: start - next(count))
    train(settings, shared_videos, out, resume=True)
    assert metrics(out) == metrics(tmp_path / "whole")


def test_two_runs_of_one_process_on_one_folder(tmp_path, config):
    refused = []

    def second():
        try:
            RunFolder(tmp_path / "link" / "run", config(), resume=True)
        except UserError as error:
            refused.append(str(error))

    (tmp_path / "link").symlink_to(tmp_path)
    with RunFolder(tmp_path / "run", config(), resume=False):
        for _ in range(2):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
    assert len(refused) == 2 and all("another run is writing" in text for text in refused)
    with RunFolder(tmp_path / "run", config(), resume=True):
        pass


def test_a_refused_run_leaves_the_lock_to_the_one_that_has_it(shared_videos, tmp_path, config):
    """Two processes: what the second one does must not free the folder for a third."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from run import make_config\n"
        "from objslot.errors import UserError; from objslot.training import train\n"
        "try: train(make_config(), sys.argv[2], sys.argv[3], resume=True)\n"
        "except UserError as error: sys.exit(str(error))"
    )
    words = [sys.executable, "-c", code, str(Path(__file__).parent), str(shared_videos), str(tmp_path / "run")]
    with RunFolder(tmp_path / "run", config(), resume=False):
        with pytest.raises(UserError):
            RunFolder(tmp_path / "run", config(), resume=False)
        done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "another run is writing" in done.stderr


def test_the_model_is_on_disk_before_the_checkpoint_that_needs_it(shared_videos, tmp_path, config, monkeypatch):
    """A run that ends between the two goes on."""

    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("objslot.training.loop.save_checkpoint", stop)
        train(config(steps=2), shared_videos, out)
    SMTC.load(out)
    train(config(steps=2), shared_videos, out, resume=True)
