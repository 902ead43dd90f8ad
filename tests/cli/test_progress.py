"""What a log shows of work that goes on."""

import pytest

from objslot.commands import _common


@pytest.mark.parametrize(
    ("rate", "words"), [(24.96, "25.0 a second"), (1, "1.0 a second"), (0.02, "50.0 s each"), (0, "none yet")]
)
def test_pace(rate, words):
    assert _common.pace(rate) == words


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 40.0, 41.0, 50.0])
    monkeypatch.setattr(_common.time, "monotonic", lambda: next(clock))
    with _common.progress("judging", "videos") as update:
        for done in (1, 2, 3):
            update(done, 3)
    assert capsys.readouterr().err.splitlines() == [
        "judging: 2 of 3 videos, 20.0 s each",
        "judging: 3 videos in 50.0 s",
    ]
