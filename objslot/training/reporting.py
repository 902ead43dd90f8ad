"""What a person sees of a run: a progress bar on a terminal, plain lines in a log, TensorBoard where asked
for.
"""

import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from objslot.errors import UserError

_TERMS = ("loss", "semantic", "instance", "diversity")
# Between two lines about work that has no steps.
_SECONDS = 10.0
_COLUMNS = "[progress.description]{task.description}", "{task.fields[terms]}", "{task.fields[speed]}"


class Reporter:
    """Shows the steps of a run; use it as a context. A ``silent`` one, of all processes but one, shows
    nothing.
    """

    def __init__(
        self, steps: int, start: int, *, log_every: int, tensorboard: Path | None = None, silent: bool = False
    ):
        self._steps = steps
        self._log_every = log_every
        self._silent = silent
        self._told = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque(maxlen=50)
        self._waited: deque[tuple[float, float]] = deque(maxlen=50)
        self._bar = None if silent or not sys.stderr.isatty() else _progress_bar()
        self._task = (
            self._bar.add_task("training", total=steps, completed=start, terms="", speed="") if self._bar else None
        )
        self._events = None if silent or tensorboard is None else _event_writer(tensorboard, start)

    def __enter__(self) -> "Reporter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._events is not None:
            self._events.close()

    def say(self, text: str) -> None:
        """One line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._silent:
            print(text, file=sys.stderr, flush=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """How far the work before the first step has got: a line every few seconds."""
        now = time.monotonic()
        if done == total or now - self._told >= _SECONDS:
            self._told = now
            self.say(f"{what}: {done}/{total}")

    def step(self, record: dict[str, Any], images: int) -> None:
        """A finished step: its line of metrics, and how many images it took."""
        if self._silent:
            return
        done = record["step"] + 1
        self._recent.append((time.monotonic(), images))
        self._waited.append((record["seconds_waiting"], record["seconds"]))
        terms = "skipped: not finite"
        if not record["skipped"]:
            terms = "  ".join(f"{name} {record[name]:.4f}" for name in _TERMS)
        speed, left = self._speed(done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, terms=terms, speed=f"{speed:.1f} images/s" if speed else "")
        if done % self._log_every and done != self._steps:
            return
        if self._bar is None:
            waiting = sum(part for part, _ in self._waited) / max(sum(whole for _, whole in self._waited), 1e-9)
            rate = f"  {speed:.1f} images/s  {waiting:.0%} waiting for data  {left} left" if speed else ""
            self.say(f"step {done}/{self._steps}  {terms}{rate}")
        if self._events is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._events.add_scalar(name, value, record["step"])

    def _speed(self, done: int) -> tuple[float, str]:
        seconds = self._recent[-1][0] - self._recent[0][0]
        if seconds <= 0:
            return 0.0, ""
        left = round(seconds / (len(self._recent) - 1) * (self._steps - done))
        images = sum(count for _, count in list(self._recent)[1:])
        return images / seconds, f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


def _progress_bar():
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    description, terms, speed = (TextColumn(column) for column in _COLUMNS)
    console = Console(stderr=True)
    return Progress(
        description, BarColumn(), MofNCompleteColumn(), terms, speed, TimeRemainingColumn(), console=console
    )


def _event_writer(folder: Path, start: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard: the package is not installed; pip install tensorboard") from None
    return SummaryWriter(folder, purge_step=start)
