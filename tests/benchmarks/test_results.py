"""JSON lines: what a record holds, and going on with a run."""

import json

import pytest
import torch

from objslot.benchmarks import machine, registry, results, runner, session
from objslot.benchmarks.suite import Job
from objslot.errors import UserError

CPU = torch.device("cpu")
QUARTILES = {"median": float, "low": float, "high": float}
SCHEMA = {
    "job": str, "kind": str, "operation": str, "shape": str, "sizes": dict, "device": str, "dtype": str,
    "threads": int, "mode": str, "name": str, "status": str, "note": str, "error": float, "bound": float,
    "seconds": dict, "first": dict, "samples": int, "dropped": int, "machine": dict, "versions": dict,
    "commit": (str, type(None)), "date": str,
}  # fmt: skip


def job(name="time sinkhorn", calls=None):
    def run():
        if calls is not None:
            calls.append(name)
        yield from runner.run(
            registry.OPERATIONS["sinkhorn"], (1, 5, 4, 2), device=CPU, dtype=torch.float32, threads=1, budget=0.01,
            wanted=lambda peer: peer == "log domain, eager",
        )  # fmt: skip

    return Job(name, run)


def run(jobs, path, **options):
    return session.run(jobs, CPU, out=path, say=lambda text: None, **options)


def test_schema(tmp_path):
    run([job()], tmp_path / "new" / "cpu.jsonl")
    records = results.read(tmp_path / "new" / "cpu.jsonl")
    assert len(records) == 4
    for record in records:
        for name, kind in SCHEMA.items():
            assert isinstance(record[name], kind), name
        assert {name: type(value) for name, value in record["seconds"].items()} == QUARTILES
        assert record["sizes"] == {"batch": 1, "rows": 5, "columns": 4, "iterations": 2}
        assert {"device", "cpu", "instruction_set", "cores"} <= record["machine"].keys()
        assert record["versions"]["torch"] == torch.__version__
        extra = {"limit", "distance"} if record["name"] == "objslot" else {"ratio"}
        assert record.keys() == SCHEMA.keys() | extra
    # Numbers that are not finite would be no JSON.
    text = (tmp_path / "new" / "cpu.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text


def test_a_run_goes_on_where_it_was_left(tmp_path):
    path, calls = tmp_path / "cpu.jsonl", []
    jobs = [job("time one", calls), job("time two", calls)]
    assert run(jobs, path, within=0.0).left == 2 and calls == []
    run(jobs[:1], path)
    outcome = run(jobs, path)
    assert calls == ["time one", "time two"] and outcome.left == 0
    before = path.read_bytes()
    run(jobs, path)
    assert path.read_bytes() == before


def test_another_machine_is_never_mixed_in(tmp_path):
    path = tmp_path / "cpu.jsonl"
    run([job()], path)
    record = json.loads(path.read_text().splitlines()[0])
    record["machine"]["cpu"] = "another"
    path.write_text(json.dumps(record) + "\n")
    before = path.read_bytes()
    with pytest.raises(UserError, match="another machine"):
        run([job()], path)
    assert path.read_bytes() == before


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("shopping\n")
    with pytest.raises(UserError, match="line 1"):
        run([job()], path)
    assert path.read_text() == "shopping\n"


def test_provenance_names_the_machine():
    found = machine.provenance(CPU)
    assert found["machine"]["cores"] >= 1 and found["machine"]["instruction_set"]
    assert set(machine.PACKAGES) <= found["versions"].keys()
