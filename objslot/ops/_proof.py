"""Which GPU kernels `objslot info --check` has seen right and fast on the device at hand.

A kernel for a GPU that is not proven for everybody (see `_backends.register`) serves by itself only where it is
proven for this device, these versions and these very kernels. The proof is a file in the user's cache folder. It
holds names only, and one that is missing or damaged proves nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def path() -> Path:
    """Where the proof is kept: objslot/proof.json in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "objslot" / "proof.json"


def holds(op: str, backend: str, device: torch.device) -> bool:
    """Whether `backend` is proven for `op` on this device; never on a CPU."""
    if device.type != "cuda" or not _proven():
        return False
    return f"{op} {backend}" in _proven().get(_kind(device), ())


def record(device: torch.device, proven: Collection[tuple[str, str]]) -> None:
    """Keep that these pairs of op and backend, and no others, are proven on devices of this kind.

    Raises OSError where the file cannot be written; it is then as it was.
    """
    target = path()
    held = _read(target)
    of_these = held.get(_kernels())
    names = sorted(f"{op} {backend}" for op, backend in proven)
    held[_kernels()] = {**(of_these if isinstance(of_these, dict) else {}), _kind(device): names}
    target.parent.mkdir(parents=True, exist_ok=True)
    # `objslot.models.files.write_whole` is out of reach: the ops need torch alone.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder) / target.name
        whole.write_text(json.dumps(held, indent=1), encoding="utf-8")
        os.replace(whole, target)
    _proven.cache_clear()


def _read(file: Path) -> dict:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


@cache
def _proven() -> dict[str, list[str]]:
    """For each kind of device the pairs that are proven there."""
    by_kind = _read(path()).get(_kernels())
    if not isinstance(by_kind, dict):
        return {}
    return {kind: names for kind, names in by_kind.items() if isinstance(names, list)}


@cache
def _kind(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.major}.{properties.minor}"


@cache
def _kernels() -> str:
    """Stands for the kernels and for what compiles and runs them: where one of these changes, nothing is proven."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for source in [*sorted(folder.rglob("*.py")), *sorted(folder.parent.glob("_cuda.*"))]:
        digest.update(source.read_bytes())
    digest.update(f"{torch.__version__} {_version('triton')}".encode())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
