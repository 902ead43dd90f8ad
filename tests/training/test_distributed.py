"""Two processes train as one does on the same clips."""

import os
import signal
import time

import pytest
import torch

from objslot.errors import UserError
from objslot.training.distributed import World
from objslot.training.loop import _sample_numbers

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def alone(shared_videos, tmp_path_factory, start):
    """The run of one process. The instance filter is on: the processes have different numbers of instances."""
    out = tmp_path_factory.mktemp("alone") / "run"
    process = start(shared_videos, out, **FIELDS)
    assert process.wait(200) == 0, process.stderr.read()
    return out


FIELDS = {"steps": 60, "batch_size": 4, "model": {"valid_similarity": 0.9}, "num_workers": 1}


def assert_same_run(metrics, out, alone):
    lines, expected = metrics(out), metrics(alone)
    assert [line["step"] for line in lines] == list(range(60))
    assert 0 < sum(line["valid_share"] for line in expected) < 60
    # Before the first update the two are equal to rounding; rounding grows over the steps.
    for step, (line, reference) in enumerate(zip(lines[:20], expected[:20], strict=True)):
        for name in ("loss", "semantic", "instance", "diversity", "valid_share", "grad_norm"):
            assert line[name] == pytest.approx(reference[name], rel=2e-6 if step == 0 else 2e-3, abs=1e-6), (
                step,
                name,
            )


def test_two_processes_equal_one(metrics, shared_videos, tmp_path, start, alone):
    out = tmp_path / "two"
    process = start(shared_videos, out, launcher=TORCHRUN, **FIELDS)
    assert process.wait(200) == 0, process.stderr.read()
    assert_same_run(metrics, out, alone)


def test_a_process_that_dies_stops_the_others_and_one_can_finish(metrics, shared_videos, tmp_path, start, alone):
    out = tmp_path / "died"
    process = start(shared_videos, out, launcher=TORCHRUN, **FIELDS)
    end = time.monotonic() + 200
    while _lines(out) < 3:
        assert time.monotonic() < end, "nothing happened"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    os.kill(_ranks(process.pid)[-1], signal.SIGKILL)
    assert process.wait(200) != 0
    assert "another process is gone" in process.stderr.read()
    assert _lines(out) < 60
    process = start(shared_videos, out, resume=True, **FIELDS)
    assert process.wait(200) == 0, process.stderr.read()
    assert_same_run(metrics, out, alone)


def _lines(out) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _ranks(launcher: int) -> list[int]:
    """Processes that a launcher started, by when they were."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            fields = open(f"/proc/{entry}/stat").read().rsplit(")", 1)[1].split() if entry.isdigit() else None
        except OSError:
            continue
        if fields and int(fields[1]) == launcher:
            found.append(int(entry))
    return sorted(found)


def test_clips_are_shared_out_without_a_rest(config):
    for processes, accumulate in ((1, 1), (2, 1), (2, 3), (4, 3)):
        settings = config(batch_size=12, accumulate=accumulate)
        numbers = []
        for rank in range(processes):
            world = World(rank, processes, torch.device("cpu"))
            share = world.share(12, accumulate)
            for part in range(accumulate):
                numbers += _sample_numbers(settings, 7, part, world, share)
        assert numbers == list(range(84, 96))
    with pytest.raises(UserError, match="batch_size: got 12, expected a multiple of processes x accumulate = 5 x 1"):
        World(0, 5, torch.device("cpu")).share(12, 1)
