import json

import pytest
from PIL import Image

from objslot.cli import main
from objslot.data.sequences import open_sequences
from objslot.demo import LEAST_J, LEAST_RATIO, DemoConfig, run_demo, summary
from objslot.errors import UserError
from objslot.models import SMTC

TINY = DemoConfig(training_videos=2, held_out_videos=2, frames=4, size=64, steps=2, batch_size=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    said = []
    return out, run_demo(out, TINY, say=said.append), said


def test_everything_is_written(tiny):
    out, results, said = tiny
    assert json.loads((out / "results.json").read_text()) == results
    assert SMTC.load(out / "model").config.encoder == "objslot_tiny"
    sequences = open_sequences("davis2017", out / "videos")
    assert [sequence.name for sequence in sequences] == list(results["sequences"])
    for sequence in sequences:
        assert (out / "found" / sequence.name / "overlay.mp4").stat().st_size > 0
        assert sequence.name in (out / "report.html").read_text()
    for picture in ("sheet.png", "best_and_worst.png"):
        Image.open(out / picture).load()
    assert len(said) == 2


def test_no_features_stay_behind(tiny):
    assert not list(tiny[0].rglob("*.npy"))


def test_goals_are_those_of_the_result(tiny):
    results = tiny[1]
    for protocol in ("A", "B"):
        goal = results["goals"][protocol]
        assert goal["J"] == results["protocols"][protocol]["J"]
        assert goal["null"] == results["baselines"]["null"]["protocols"][protocol]["J"]
        assert goal["frozen"] == results["baselines"]["frozen"]["protocols"][protocol]["J"]
        assert goal["reached"] == (goal["J"] >= LEAST_J and goal["J"] >= LEAST_RATIO * goal["null"])
    assert f"{100 * results['goals']['B']['J']:.1f}" in summary(results)


def test_the_verdict_needs_every_goal():
    goal = {"J": 0.7, "null": 0.2, "frozen": 0.5, "ratio": 3.5, "reached": True}
    missed = goal | {"J": 0.5, "reached": False}
    assert "goal reached" in summary({"goals": {"A": goal, "B": goal}})
    assert "goal NOT reached" in summary({"goals": {"A": goal, "B": missed}})


def test_an_output_folder_in_use_is_left_alone(tiny):
    out = tiny[0]
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match="not empty"):
        run_demo(out, TINY)
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("reached", [True, False])
def test_the_command(tmp_path, monkeypatch, capsys, reached):
    goal = {"J": 0.7, "null": 0.2, "frozen": 0.5, "ratio": 3.5, "reached": reached}
    asked = []

    def stand_in(out, config, say):
        asked.append((out, config.seed))
        return {"goals": {"A": goal}}

    monkeypatch.setattr("objslot.demo.run_demo", stand_in)
    assert main(["demo", "--out", str(tmp_path / "out"), "--seed", "5"]) == (0 if reached else 1)
    assert asked == [(tmp_path / "out", 5)]
    assert "70.0" in capsys.readouterr().out


def test_the_command_refuses_what_will_not_do(tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("kept")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert main(["demo", "--out", str(tmp_path / "out"), "--seed", "-1"]) == 2
    error = capsys.readouterr().err
    assert "not empty" in error
    assert "--seed" in error


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    results = run_demo(tmp_path / "out")
    assert all(goal["reached"] for goal in results["goals"].values()), summary(results)
