"""A long run in short: see scripts/soak.py, which takes any number of minutes."""

import json
import mmap
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak.py"


def soak(tmp_path, minutes):
    words = [sys.executable, SCRIPT, "--minutes", str(minutes), "--out", tmp_path]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_is_seen_on_the_heap_and_in_mapped_files(tmp_path):
    memory = runpy.run_path(str(SCRIPT))["memory"]
    (tmp_path / "mapped").write_bytes(bytes(64 << 20))
    with open(tmp_path / "mapped", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        before = memory()
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        between = memory()
        held = b"x" * (64 << 20)
        after = memory()
    assert len(held) and 60 < between - before < 70 and 60 < after - between < 70


@pytest.mark.nightly
def test_nothing_leaks(tmp_path):
    found = soak(tmp_path, 45)
    assert found["leaks"] == [] and found["steps"] > 1000


@pytest.mark.slow
def test_the_soak_sees_a_run(tmp_path):
    """A quarter of a minute says nothing of memory; files, threads and loaders are seen all the same."""
    code = "import runpy, sys; sys.argv[1:] = ['--minutes', '0.25', '--out', sys.argv[1]]\n"
    code += f"module = runpy.run_path({str(SCRIPT)!r}); module['main'].__globals__['SLACK'] = float('inf')\n"
    code += "sys.exit(module['main']())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] > 2 and found["loaders_left"] == 0
