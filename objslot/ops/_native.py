"""The compiled module objslot._native, imported at first use, or the reason why there is none."""

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def _import() -> tuple[ModuleType | None, str | None]:
    # torch brings the OpenMP runtime that the module shares with it: the first one loaded is the only one.
    import_module("torch")
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


def why_not_cpu(*, device, **facts) -> str | None:
    """The row of a table of backends for kernels that take every CPU tensor."""
    if device.type != "cpu":
        return f"needs a CPU tensor, got one on {device.type}"
    return None if load() is not None else why_missing()
