"""The compiled module objslot._cuda, imported when it is first asked for, or the reason why there is none."""

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def load() -> tuple[ModuleType | None, str | None]:
    """The module and None, or None and why it cannot be used."""
    # The device context belongs to torch.
    import_module("torch")
    try:
        return import_module("objslot._cuda"), None
    except ImportError as error:
        return None, f"the compiled module objslot._cuda is missing ({error})"


def why_not(*, device) -> str | None:
    """Why no CUDA kernel serves a tensor on `device`, or None."""
    if device.type != "cuda":
        return f"needs a CUDA tensor, got one on {device.type}"
    return load()[1]
