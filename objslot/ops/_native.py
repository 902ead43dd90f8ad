"""The compiled module objslot._native, imported at first use, or the reason why there is none."""

import math
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch


@cache
def _import() -> tuple[ModuleType | None, str | None]:
    # torch, imported above, brings the OpenMP runtime that the module shares with it: the first one loaded is
    # the only one.
    try:
        return import_module("objslot._native"), None
    except ImportError as error:
        return None, str(error)


def why_missing() -> str | None:
    """None when the compiled module can be used, otherwise the reason why not."""
    return _import()[1]


@cache
def load() -> ModuleType | None:
    """The module objslot._native, or None, with one warning, where it was not built or does not load."""
    module, reason = _import()
    if module is None:
        warnings.warn(
            f"objslot runs on its slower reference backend: the compiled module is missing ({reason}). "
            "Reinstall with a C++ compiler to build it; pip install -v shows what failed.",
            RuntimeWarning,
            stacklevel=2,
        )
    return module


# The numbers of the dtypes in the module.
ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}

# Smaller results are cheap to allocate; larger ones should not be kept after they are gone.
_LEAST_KEPT, _MOST_KEPT = 1 << 19, 1 << 26


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous CPU tensor for a result: a large one reuses the memory of results that are gone.

    The first write to a fresh page costs ten times what the memory costs later. At most 128 MiB are kept.
    """
    count = math.prod(shape)
    if not _LEAST_KEPT <= count * dtype.itemsize <= _MOST_KEPT:
        return torch.empty(shape, dtype=dtype)
    return torch.from_dlpack(load().result(tuple(shape), ELEMENTS[dtype]))


def why_not_cpu(*, device, **facts) -> str | None:
    """The row of a table of backends for kernels that take every CPU tensor."""
    if device.type != "cpu":
        return f"needs a CPU tensor, got one on {device.type}"
    return None if load() is not None else why_missing()
