"""Two processes train as one does on the same clips."""

import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from objslot.errors import UserError
from objslot.training.checkpoint import list_checkpoints
from objslot.training.distributed import World, _own_store
from objslot.training.loop import _sample_numbers

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def alone(shared_videos, tmp_path_factory, start):
    """The run of one process. The instance filter is on: the processes have different numbers of instances."""
    out = tmp_path_factory.mktemp("alone") / "run"
    process = start(shared_videos, out, **FIELDS)
    assert process.wait(200) == 0, process.stderr.read()
    return out


# Updates so small that rounding does not grow into another run.
FIELDS = {"steps": 40, "batch_size": 4, "model": {"valid_similarity": 0.9}, "num_workers": 1, "lr": 1e-3, "seed": 2}
FIELDS |= {"checkpoint_every": 10}


def assert_same_run(metrics, out, alone):
    lines, expected = metrics(out), metrics(alone)
    assert [line["step"] for line in lines] == list(range(40))
    assert 0 < sum(line["valid_share"] for line in expected) < 40
    # Before the first update the two are equal to rounding; rounding grows over the steps.
    for step, (line, reference) in enumerate(zip(lines[:20], expected[:20], strict=True)):
        for name in ("loss", "semantic", "instance", "diversity", "valid_share", "grad_norm"):
            relative = 2e-6 if step == 0 else 1e-4 if step < 6 else 2e-3
            assert line[name] == pytest.approx(reference[name], rel=relative, abs=1e-6), (step, name)


def test_two_processes_equal_one(metrics, shared_videos, tmp_path, start, alone):
    out = tmp_path / "two"
    process = start(shared_videos, out, launcher=(*TORCHRUN, "2"), **FIELDS)
    assert process.wait(200) == 0, process.stderr.read()
    assert_same_run(metrics, out, alone)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_of_two_processes_is_that_of_one(shared_videos, tmp_path, start, accumulate):
    fields = {"steps": 1, "batch_size": 4, "model": {"valid_similarity": -1.0}, "accumulate": accumulate}
    moments = []
    for name, launcher in (("one", ()), ("two", (*TORCHRUN, "2"))):
        process = start(shared_videos, tmp_path / name, launcher=launcher, **fields)
        assert process.wait(200) == 0, process.stderr.read()
        tensors = load_file(list_checkpoints(tmp_path / name / "checkpoints")[-1].path)
        # After one step AdamW's first moment is a tenth of the gradient.
        moments.append({key: value for key, value in tensors.items() if key.endswith("/exp_avg")})
    assert moments[0].keys() == moments[1].keys()
    assert len(moments[0]) > 10
    # The bias of the slots' norm has a gradient of nothing but rounding, so the scale is that of the whole.
    scale = torch.cat([moment.flatten() for moment in moments[0].values()]).norm()
    for key, expected in moments[0].items():
        assert (moments[1][key] - expected).norm() < 1e-5 * scale, key


def stop_midway(process, out) -> None:
    """Wait until the first checkpoint and two more steps, then kill the second process of the group."""
    end = time.monotonic() + 200
    while _lines(out) < 12:
        assert time.monotonic() < end, "nothing happened"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    os.kill(_ranks(process.pid)[-1], signal.SIGKILL)


@pytest.mark.parametrize("processes", [1, 4])
def test_a_process_that_dies_stops_the_others_and_another_number_can_finish(
    metrics, shared_videos, tmp_path, start, alone, processes
):
    out = tmp_path / "died"
    process = start(shared_videos, out, launcher=(*TORCHRUN, "2"), **FIELDS)
    stop_midway(process, out)
    assert process.wait(200) != 0
    assert "another process is gone" in process.stderr.read()
    assert _lines(out) < 40
    launcher = (*TORCHRUN, str(processes)) if processes > 1 else ()
    process = start(shared_videos, out, resume=True, launcher=launcher, **FIELDS)
    assert process.wait(200) == 0, process.stderr.read()
    assert_same_run(metrics, out, alone)


def test_torchrun_starts_the_group_again_and_it_goes_on(metrics, shared_videos, tmp_path, start, alone):
    out = tmp_path / "restarted"
    launcher = (*TORCHRUN, "2", "--max-restarts", "1")
    process = start(shared_videos, out, resume=True, launcher=launcher, **FIELDS)
    stop_midway(process, out)
    assert process.wait(200) == 0, process.stderr.read()
    printed = process.stderr.read()
    assert "another process is gone" in printed
    assert "40 steps, from step 10:" in printed
    assert_same_run(metrics, out, alone)


def test_a_restart_on_several_machines_says_what_it_needs(monkeypatch):
    assert _own_store() == {}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        _own_store()
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert _own_store() == {}


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
