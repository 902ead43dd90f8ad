"""Output folders: safe names, nothing overwritten, whole results or none."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from objslot.errors import UserError


def safe_name(name: str) -> str:
    """A folder name made of the name of a video: letters, digits, `-`, `_` and inner dots, never a path.

    >>> safe_name("../a clip.mp4")
    'a_clip.mp4'
    """
    cleaned = re.sub(r"[^\w.-]+", "_", name).strip("._")[:100]
    return cleaned or "video"


def refuse_existing(folder: Path) -> None:
    """Raises UserError when `folder` is a file or a folder that holds anything."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} already exists and is not empty; choose another --out or move it away")


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write in, which becomes `folder` if the block ends well and vanishes if it does not.

    Raises:
        UserError: `folder` exists and is not empty. Nothing is written before that.
    """
    folder = Path(os.path.abspath(folder))
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
