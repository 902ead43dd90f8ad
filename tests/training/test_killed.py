"""Runs killed at random moments: see killing.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KINDS = {
    "frozen": {"checkpoint_every": 1},
    "stored features": {"cache_features": True},
    "encoder trained": {"model": {"train_encoder": True}, "unfreeze_at": 3},
}


def kill(shared_videos, tmp_path, kind, kills, seed=0):
    words = [shared_videos, tmp_path, kills, seed, json.dumps(KINDS[kind])]
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["frozen", "stored features"])
def test_killed_at_a_few_moments(shared_videos, tmp_path, kind):
    found = kill(shared_videos, tmp_path, kind, 6)
    assert found["kills"] == 6 and found["finished"] >= 1


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("frozen", marks=pytest.mark.slow),
        pytest.param("stored features", marks=pytest.mark.nightly),
        pytest.param("encoder trained", marks=pytest.mark.nightly),
    ],
)
def test_killed_at_a_hundred_moments(shared_videos, tmp_path, kind):
    found = kill(shared_videos, tmp_path, kind, 100, seed=1)
    assert found["kills"] == 100 and found["finished"] > 5
    assert found["before the first checkpoint"] > 0 and len(found["steps"]) > 3
