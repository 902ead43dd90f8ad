"""`objslot bench`."""

import json

import pytest
import torch

from objslot.benchmarks import registry, suite
from objslot.cli import main


def test_quick_run_of_one_op(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "BUDGET_QUICK", 0.02)
    threads = torch.get_num_threads()
    try:
        assert main(["bench", "assign", "--quick", "--threads", "1", "--out", str(tmp_path / "a.jsonl")]) == 0
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "assign (512 problems, 4 rows, 4 columns), float32, 1 thread, forward" in said
    assert "left out" in said and "  objslot " in said and "scipy" in said
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {record["name"] for record in records} >= {"objslot", "scipy, one problem after the other"}
    assert not any("compiled" in record["name"] for record in records)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["warp_drive"], "warp_drive"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--device", "cuda"], "--device cuda"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(arguments, words, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


def jobs(**options):
    plan = suite.Plan(device=torch.device("cpu"), threads=[2, 1], **options)
    return [job.name for job in suite.jobs(registry.find(["sinkhorn"]), plan, training=False)]


def test_jobs_of_the_whole_suite():
    names = jobs()
    assert len(set(names)) == len(names)
    assert {"time sinkhorn 48x256x256x3 float32 2", "time sinkhorn 48x256x256x3 float32 1"} <= set(names)
    assert "time sinkhorn 48x256x256x3 bfloat16 2" in names and "memory sinkhorn 48x256x256x3" in names
    assert {f"scaling sinkhorn {axis}" for axis in ("batch", "rows", "iterations")} <= set(names)


def test_given_shapes_are_timed_alone_and_must_fit():
    assert jobs(shapes=[(1, 2, 3, 4)], dtypes=["float32"]) == [
        "time sinkhorn 1x2x3x4 float32 2",
        "time sinkhorn 1x2x3x4 float32 1",
    ]
    with pytest.raises(suite.UserError, match="sinkhorn expects batchxrowsxcolumnsxiterations, got 1x2"):
        jobs(shapes=[(1, 2)])
