"""What stops a run, or lets it go on: signals, videos that cannot be read, losses that are not finite."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from objslot.data.clips import TooShort
from objslot.errors import UserError
from objslot.models.files import write_whole
from objslot.training.checkpoint import reason


class Interruption:
    """Turns the first Ctrl-C or SIGTERM into a request, so that a step can be finished and saved; use it as a
    context.

    A second signal acts at once. Outside the main thread signals are left alone.
    """

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def leave(self) -> None:
        """Raise what the signal stands for: `KeyboardInterrupt`, or `SystemExit` with 143."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _request(self, number, frame) -> None:
        self.signal = number
        signal.signal(number, self._previous[number])


class UnusableVideos:
    """Counts the videos that cannot be used and stops the run when there are too many.

    ``total`` videos were found; more than a share ``most`` of them unreadable is too many. Videos that are
    too short are named and left out but not counted.
    """

    def __init__(self, total: int, most: float, say: Callable[[str], None]):
        self.total = total
        self.most = most
        self._say = say
        self._known: set[int | str] = set()
        self._first: UserError | None = None
        self.unreadable = 0

    def __len__(self) -> int:
        return len(self._known)

    def note(self, key: int | str, error: UserError) -> None:
        """A video, with a ``key`` of its own, cannot be used: `UserError` when that is one too many."""
        if key in self._known:
            return
        self._known.add(key)
        if not isinstance(error, TooShort):
            self.unreadable += 1
            self._first = self._first or error
        if len(self._known) == self.total:
            more = f" (and {self.total - 1} more)" if self.total > 1 else ""
            raise UserError(f"no video is left to train on: {error}{more}")
        self._say(f"skipping a video: {error}")
        if self.unreadable > self.most * self.total:
            raise UserError(
                f"{self.unreadable} of {self.total} videos cannot be read, more than "
                f"max_unreadable = {self.most:g} allows; the first: {self._first}"
            )


def save_failed_batch(folder: Path, step: int, batch: dict[str, Any], record: dict[str, Any]) -> str:
    """Keep the batch whose loss was not finite, with its metrics, as one safetensors file in ``folder``.

    Returns where it is or why it could not be written, for the message of the error that stops the run.
    """
    path = folder / f"failed-step-{step:08d}.safetensors"
    tensors = {name: value.cpu().contiguous() for name, value in batch.items() if isinstance(value, Tensor)}
    try:
        write_whole(path, lambda temporary: save_file(tensors, temporary, {"record": json.dumps(record)}))
    except (OSError, SafetensorError) as error:
        return f"its batch could not be written to {path} ({reason(error)})"
    return f"its batch is in {path}"
