"""The training step's rows: what is compared with what."""

from functools import partial

import pytest
import torch

from objslot.benchmarks import checking, suite, training_parts, training_step

CPU = torch.device("cpu")
SMALL = {"sizes": (1, 2, 64), "encoder": "test_vit.r160_in1k"}


@pytest.mark.parametrize("setting", training_step.SETTINGS, ids=str)
def test_a_training_step_and_the_authors_formulation_agree(setting):
    step = training_step.Step(CPU, setting, **SMALL)
    ours, theirs = step.errors()
    assert 0 < ours <= checking.bound(theirs, setting.dtype)
    for run in (step.run_ours, step.run_theirs):
        run()
    assert step.our_losses()["valid_share"] > 0


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(training_step, "Step", partial(training_step.Step, **SMALL))
    monkeypatch.setattr(training_parts, "Step", partial(training_parts.Step, **SMALL))
    monkeypatch.setattr(training_step, "BUDGET", 0.5)
    monkeypatch.setattr(training_parts, "BUDGET", 0.1)


def test_whole_steps_are_timed_beside_the_same_and_the_literal_setting(small_steps):
    whole, _, parts, _ = training_step.jobs(suite.Plan(device=CPU, threads=[torch.get_num_threads()]))
    found = {(record["mode"], record["dtype"], record["name"]): record for record in whole.run()}
    for setting in training_step.SETTINGS:
        key = setting.mode, str(setting.dtype).removeprefix("torch.")
        assert found[(*key, "objslot")]["status"] == "ok"
        assert ((*key, suite.AUTHORS) in found) == (setting.encoder != "stored")
        assert ((*key, suite.AUTHORS_LEARNING) in found) == (setting != training_step.LITERAL)
        if setting != training_step.LITERAL:
            literal = found[(*key, suite.AUTHORS_LEARNING)]
            assert literal["status"] == "other result" and literal["ratio"]["median"] > 0
    names = [record["mode"] for record in parts.run() if record["name"] == "objslot"]
    assert names == list(training_parts.PARTS)


@pytest.mark.parametrize("part", training_parts.PARTS)
def test_the_memory_of_a_part_is_that_of_its_own_call(small_steps, monkeypatch, part):
    called = []

    class Here:
        """Measures in this process what another would."""

        def __init__(self, device): ...

        def __enter__(self):
            return self

        def __exit__(self, *failure): ...

        def peak_of(self, request, call):
            training_step.step_call(CPU, request)()
            called.append((request["part"], request["name"]))
            return 1

    monkeypatch.setattr(training_parts.memory, "Measurer", Here)
    monkeypatch.setattr(training_parts, "PARTS", (part,))
    records = list(training_parts.peaks(CPU, 1))
    assert called == [(part, "objslot"), (part, suite.AUTHORS)]
    assert [(record["kind"], record["mode"], record["name"]) for record in records] == [
        ("memory", part, name) for name in ("objslot", suite.AUTHORS)
    ]


def test_a_step_that_is_wrong_has_no_time(monkeypatch):
    class Wrong(training_step.Step):
        def errors(self):
            return 1.0, 1e-7

    monkeypatch.setattr(training_step, "Step", partial(Wrong, **SMALL))
    monkeypatch.setattr(training_step, "BUDGET", 0.1)
    (job,) = training_step.jobs(suite.Plan(device=CPU, threads=[1], quick=True))
    ours, theirs = job.run()
    assert ours["status"] == "wrong" and "seconds" not in ours
    assert theirs["status"] == "ok" and "ratio" not in theirs
