"""Where a record comes from: machine, versions, commit and date."""

import datetime
import os
import platform
import subprocess
from importlib import import_module, metadata
from pathlib import Path

import torch

from objslot import info
from objslot.ops import _native

PEERS = ("POT", "geomloss", "slot-attention", "flash-sinkhorn")
PACKAGES = ("objslot", "torch", "triton", "timm", "numpy", "scipy", *PEERS)
ROOT = Path(__file__).resolve().parents[2]


def provenance(device: torch.device) -> dict:
    """{"machine", "versions", "commit", "date"} of a run on `device`; versions are None for what is missing."""
    native = _native.load()
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": info.cpu_model(),
        "instruction_set": native.isa() if native is not None else "reference",
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(terse=True),
    }
    if device.type == "cuda":
        machine["driver"] = _driver()
        machine["runtime"] = torch.version.hip or torch.version.cuda
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {"machine": machine, "versions": versions, "commit": _commit(), "date": date}


def _version(name: str) -> str | None:
    # Their own word: the build of torch is not in its metadata, and a checkout has none.
    if name in ("objslot", "torch"):
        return import_module(name).__version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that the package lies in, with "+" where sources differ from it; None elsewhere."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "objslot", "csrc")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None
