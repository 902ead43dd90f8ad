"""The `objslot` command: its subcommands, and what a person sees when something is wrong."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn, Union

import tyro

from objslot.commands import COMMANDS, Command
from objslot.errors import BackendError, UserError

INTERRUPTED, TERMINATED, USER_ERROR, UNEXPECTED = 130, 143, 2, 1


def run_process() -> NoReturn:
    """The process of the `objslot` command: does what its words say, and leaves at once.

    What libraries do when they are taken down is left out: CUDA's read 190 MB of their files for it, and now and then
    one process of a group aborts. What was registered to be done at exit is done, as in a child of multiprocessing.
    """
    code = main()
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or UNEXPECTED
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        arguments: the words after `objslot`; those of the process if None.

    Returns:
        0 when it succeeded, 1 when a check of `info` failed or on an unexpected error, 2 on bad input, 130 on
        Ctrl-C and 143 on SIGTERM.
    """
    command = _parse(sys.argv[1:] if arguments is None else arguments)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return command.run() or 0
    except KeyboardInterrupt:
        print("objslot: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else UNEXPECTED
    except BrokenPipeError:
        # The reader has gone; closing stderr keeps the interpreter from complaining about it at exit.
        sys.stderr.close()
        return UNEXPECTED
    except Exception as error:
        return _explain(error, command)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parse(arguments: Sequence[str]):
    choices = [
        Annotated[kind, tyro.conf.subcommand(name=name, description=kind.__doc__, prefix_name=False)]
        for name, kind in COMMANDS.items()
    ]
    return tyro.cli(
        Union[tuple(choices)],  # noqa: UP007  built from a list
        prog="objslot",
        args=list(arguments),
        description="Discover the objects in a video without labels.",
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )


def _terminate(number, frame) -> None:
    raise SystemExit(TERMINATED)


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"objslot: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _explain(error: Exception, command: Command) -> int:
    if command.debug:
        traceback.print_exception(error)
    expected = isinstance(error, UserError | BackendError | OSError)
    text = " ".join(str(error).split()) or type(error).__name__
    if expected:
        text = command.in_flags(text)
    else:
        hint = "" if command.debug else "; --debug shows where"
        text = f"unexpected {type(error).__name__}: {text}{hint}"
    print(f"objslot: error: {text}", file=sys.stderr)
    return USER_ERROR if expected else UNEXPECTED


if __name__ == "__main__":
    run_process()
