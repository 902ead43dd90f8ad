"""What several subcommands share; importing it is light."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, ClassVar

import tyro


def option(help_text: str, metavar: str | None = None, default: object = None):
    """How a flag is shown by --help: its text, the name of its value, and a default worth showing."""
    hint = "" if default is None else f"(default: {default})"
    return tyro.conf.arg(help=help_text, metavar=metavar, help_behavior_hint=hint)


@dataclasses.dataclass
class Command:
    """A subcommand: its fields are its flags."""

    debug: Annotated[bool, option("Show a traceback when something goes wrong.")] = False

    called: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Names that the library has for a field besides its own."""

    def in_flags(self, message: str) -> str:
        """A message of the library, its arguments named as the flags that they came from: `batch_size` is --batch-size.

        A name of one plain word is one only where the message begins an item with it, and where its flag was given.
        """
        for field in dataclasses.fields(self):
            flag, value = f"--{field.name.replace('_', '-')}", getattr(self, field.name)
            for name in (field.name, *self.called.get(field.name, ())):
                if "_" in name:
                    message = re.sub(rf"(?<![\w/.-]){name}(?![\w/.-])", flag, message)
                elif value is not None and value is not False:
                    message = re.sub(rf"(?:(?<=^)|(?<=\()|(?<=; )){name}(?=: )", flag, message)
        return message

    def run(self) -> int | None:
        """Does the work; a number is the exit code."""
        raise NotImplementedError


def load_model(directory: Path):
    """The model in `directory`, ready to segment, on the GPU where there is one."""
    import torch

    from objslot.models import SMTC

    model = SMTC.load(directory).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def say(text: str) -> None:
    """One line on stdout, at once."""
    print(text, flush=True)


def pace(rate: float) -> str:
    """How fast something goes, from how many come in a second: "3.2 a second", or "45 s each"."""
    if rate >= 1:
        return f"{rate:.1f} a second"
    return f"{1 / rate:.1f} s each" if rate > 0 else "none yet"


@contextmanager
def progress(title: str, unit: str = "frames", every: float = 30.0) -> Iterator:
    """Gives a function to call with (done, total): a bar on a terminal, a line every few seconds in a log.

    Args:
        title: what is being done.
        unit: what is counted.
        every: seconds between two lines of a log.
    """
    if sys.stderr.isatty():
        with _bar(title, unit) as update:
            yield update
        return
    started = last = time.monotonic()
    state = {"done": 0, "last": last}

    def line(done: int, total: int) -> None:
        now = time.monotonic()
        state["done"] = done
        if now - state["last"] >= every:
            state["last"] = now
            print(
                f"{title}: {done} of {total} {unit}, {pace(done / (now - started))}",
                file=sys.stderr,
                flush=True,
            )

    yield line
    seconds = time.monotonic() - started
    print(f"{title}: {state['done']} {unit} in {seconds:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def _bar(title: str, unit: str) -> Iterator:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), rate)
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, rate="")

        def update(done: int, total: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, completed=done, total=total, rate=pace(speed) if speed else "")

        yield update
