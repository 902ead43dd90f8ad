"""What is shown of a run: lines in a log, a bar on a terminal, events for TensorBoard."""

import io
import sys
import types

import pytest

from objslot.errors import UserError
from objslot.training import reporting
from objslot.training.reporting import Reporter


def record(step, skipped=False):
    terms = {"loss": 3.0, "semantic": 2.0, "instance": 0.25, "diversity": 0.75}
    timing = {"seconds": 1.0, "seconds_waiting": 0.25}
    return {"step": step, "skipped": skipped, **(dict.fromkeys(terms) if skipped else terms), **timing}


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves a second a step."""
    now = [100.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    return now


def test_lines_of_a_log(capsys, clock):
    with Reporter(25, 0, log_every=10) as reporter:
        for step in range(25):
            clock[0] += 1
            reporter.step(record(step, skipped=step == 19), images=8)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["10/25", "20/25", "25/25"]
    assert "loss 3.0000  semantic 2.0000  instance 0.2500  diversity 0.7500" in lines[0]
    assert "  8.0 images/s  25% waiting for data  0:00:15 left" in lines[0]
    assert "skipped: not finite" in lines[1]


def test_a_silent_reporter_says_nothing(capsys):
    with Reporter(3, 0, log_every=1, silent=True) as reporter:
        reporter.say("hello")
        reporter.step(record(0), images=8)
    assert capsys.readouterr().err == ""


def test_work_before_the_first_step_is_told_now_and_then(capsys, clock):
    reporter = Reporter(3, 0, log_every=1)
    for done in range(1, 41):
        clock[0] += 1
        reporter.progress("frames", done, 40)
    assert capsys.readouterr().err.splitlines() == [f"frames: {done}/40" for done in (10, 20, 30, 40)]


def test_a_bar_on_a_terminal(monkeypatch, clock):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "stderr", terminal)
    with Reporter(4, 0, log_every=1) as reporter:
        for step in range(4):
            clock[0] += 1
            reporter.step(record(step), images=8)
        reporter.say("[a line]")
    shown = terminal.getvalue()
    assert "4/4" in shown
    assert "loss 3.0000" in shown
    assert "8.0 images/s" in shown
    assert "[a line]" in shown


def test_events_for_tensorboard(monkeypatch, tmp_path):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with Reporter(4, 2, log_every=2, tensorboard=tmp_path) as reporter:
        reporter.step(record(2), images=8)
        reporter.step(record(3), images=8)
    assert written[0] == (tmp_path, 2)
    assert ("loss", 3.0, 3) in written
    assert written[-1] == "closed"
    assert len(written) == 8

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        Reporter(4, 2, log_every=2, tensorboard=tmp_path)
