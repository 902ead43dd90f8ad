"""Trains for a stated time on made-up videos and says whether memory, files, threads or processes leak.

Usage: soak.py [--minutes 45] [--out DIR]. Prints one line of JSON; leaves with 1 where something leaks. Memory is that
of this process and its loaders, see `memory`, sampled every few seconds; the slope is fitted to the second half, and
"noise" is three standard errors of it, taken from blocks so that slow swings count as noise.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from objslot.data.synthetic import SyntheticVideos
from objslot.models import SMTCConfig
from objslot.training import TrainingConfig, train

BLOCKS = 8
# What a run that leaks nothing may still grow by: pages that the allocator keeps, in megabytes an hour.
SLACK = 30.0
# Seconds that a run may take until its first step; one that hangs ends too.
LATEST_START = 600.0


class Sampler(threading.Thread):
    """Takes (seconds, megabytes, open files, threads) every ``interval`` seconds and ends the run after ``seconds``.

    Both begin with the first line of the file `steps`: however slow the machine is, everything has been started then.
    """

    def __init__(self, steps: Path, seconds: float, interval: float):
        super().__init__(daemon=True)
        self.steps = steps
        self.seconds = seconds
        self.interval = interval
        self.samples: list[tuple[float, float, int, int]] = []

    def run(self):
        latest = time.monotonic() + LATEST_START
        while not (self.steps.is_file() and self.steps.stat().st_size) and time.monotonic() < latest:
            time.sleep(0.1)
        began = time.monotonic()
        while time.monotonic() - began < self.seconds:
            time.sleep(self.interval)
            self.samples.append((time.monotonic() - began, memory(), *held()))
        os.kill(os.getpid(), signal.SIGINT)


def children() -> list[int]:
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def memory() -> float:
    """Megabytes that this process and its children hold: pages that they share counted once, those of files in each.

    The share of a file's pages depends on who else has it open, which would be noise.
    """
    total = 0
    for pid in [os.getpid(), *children()]:
        try:
            shares = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            whole = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in shares if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        total += sum(int(line.split()[1]) for line in whole if line.startswith("RssFile:"))
    return total / 1024


def held() -> tuple[int, int]:
    """Open files and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def slope(samples: np.ndarray) -> tuple[float, float]:
    """Megabytes an hour over the second half, and three standard errors."""
    later = samples[len(samples) // 2 :]
    blocks = np.array_split(later, BLOCKS)
    hours = np.array([block[:, 0].mean() / 3600 for block in blocks])
    level = np.array([np.median(block[:, 1]) for block in blocks])
    hours = hours - hours.mean()
    found = (hours * level).sum() / (hours**2).sum()
    rest = level - level.mean() - found * hours
    return float(found), float(3 * np.sqrt((rest**2).sum() / (BLOCKS - 2) / (hours**2).sum()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(dir=given.out))
    for video in SyntheticVideos(seed=0, n_videos=6, n_frames=24, size=96):
        video.write_mp4(root / "videos" / f"{video.name}.mp4")
    model = SMTCConfig(encoder="objslot_tiny", image_size=96, slots=6, instances=2)
    # Everything a long run does now and then comes often here: checkpoints, the end of a pass, workers.
    config = TrainingConfig(model=model, steps=10**7, batch_size=2, checkpoint_every=25, num_workers=2, log_every=10**6)

    sampler = Sampler(root / "run" / "metrics.jsonl", 60 * given.minutes, max(0.5, min(5.0, given.minutes)))
    before = held()
    sampler.start()
    try:
        train(config, root / "videos", root / "run")
    except KeyboardInterrupt:
        pass
    sampler.join()
    deadline = time.monotonic() + 20
    while children() and time.monotonic() < deadline:
        time.sleep(0.1)
    after = held()
    samples = np.array(sampler.samples)
    np.savetxt(root / "samples.csv", samples, "%.1f", ",", header="seconds,megabytes,open files,threads", comments="")
    growth, noise = slope(samples)
    later = samples[len(samples) // 4 :]
    steps = sum(1 for _ in open(root / "run" / "metrics.jsonl"))
    found = {
        "minutes": round(samples[-1, 0] / 60, 2),
        "steps": steps,
        "threads": torch.get_num_threads(),
        "memory_mb": [round(float(value), 1) for value in (later[0, 1], samples[-1, 1])],
        "slope_mb_per_hour": round(growth, 1),
        "noise_mb_per_hour": round(noise, 1),
        "open_files": [before[0], int(later[:, 2].min()), int(later[:, 2].max()), after[0]],
        "process_threads": [before[1], int(later[:, 3].min()), int(later[:, 3].max()), after[1]],
        "loaders_left": len(children()),
    }
    leaks = {
        "memory": growth > noise + SLACK,
        # One file of each kind may be open for a moment: a checkpoint, a video.
        "files while running": later[:, 2].max() - later[: max(1, len(later) // 4), 2].max() > 4,
        "files": after[0] - before[0] > 4,
        "threads while running": later[-1, 3] > later[0, 3] + 2,
        "loaders": bool(children()),
    }
    found["leaks"] = [name for name, leaking in leaks.items() if leaking]
    print(json.dumps(found))
    return bool(found["leaks"])


if __name__ == "__main__":
    sys.exit(main())
