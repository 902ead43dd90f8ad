"""Peaks of memory, of code that runs in a process of its own."""

import os
import subprocess
import sys
import textwrap

# A child's ru_maxrss begins with its parent's, which would hide whatever is less than that.
_PEAK = """
def peak_of_this_process():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
"""


def printed(code, *arguments):
    """The numbers that the code prints, MiB, among other words; it may call `peak_of_this_process`."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.splitlines() if line.replace(".", "", 1).isdigit()]


def assert_growth(code, *arguments, most):
    """From each peak printed to the next there are less than `most` MiB, in one of three runs.

    What the system happens to count makes single peaks larger by some 20 MiB; what is held is held in every run.
    """
    growths = []
    for _ in range(3):
        peaks = printed(code, *arguments)
        growths.append([later - earlier for earlier, later in zip(peaks, peaks[1:], strict=False)])
        if all(growth < bound for growth, bound in zip(growths[-1], most, strict=True)):
            return
    raise AssertionError((growths, most))
