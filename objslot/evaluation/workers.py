"""Processes that work side by side: threads would wait for each other between numpy's short calls."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1
ITEMS_AT_ONCE = 4
"""Items that go to a process together."""


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def side_by_side(target: object, count: int) -> Iterator[Callable[..., list]]:
    """Gives a function (name, items, arguments) -> the list of `target.name(item, *arguments)` of all items.

    With a `count` of more than one it does so in as many forked processes. These see `target` as it is now, without
    a copy of it being made; what goes to them later and what comes back is pickled. They must not touch what a
    fork does not carry over: other threads (OpenMP among them), and accelerators. They leave interrupts to this
    process and end with it.
    """
    if count == 1:
        yield lambda name, items, arguments=(): [getattr(target, name)(item, *arguments) for item in items]
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, context, initializer=_settle, initargs=(target,)) as executor:

        def run(name: str, items: Iterable, arguments: tuple = ()) -> list:
            items = list(items)
            starts = range(0, len(items), ITEMS_AT_ONCE)
            chunks = [(name, items[k : k + ITEMS_AT_ONCE], arguments) for k in starts]
            return [result for results in executor.map(_run, chunks) for result in results]

        try:
            yield run
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


_target: object = None


def _settle(target: object) -> None:
    global _target
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _target = target


def _run(chunk: tuple[str, list, tuple]) -> list:
    name, items, arguments = chunk
    return [getattr(_target, name)(item, *arguments) for item in items]
