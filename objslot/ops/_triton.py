"""Modules of Triton kernels, imported when they are first asked for: importing objslot imports no triton."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


@cache
def kernels(package: str) -> ModuleType:
    """The module `triton_kernels` of an op's package."""
    return import_module(f"{package}.triton_kernels")


def why_not(package: str) -> Callable[..., str | None]:
    """The row of a table of backends: needs a CUDA tensor, triton, and that the kernels have no reason of theirs."""

    def reason(*, device, **facts) -> str | None:
        if device.type != "cuda":
            return f"needs a CUDA tensor, got one on {device.type}"
        if find_spec("triton") is None:
            return "triton is not installed"
        return kernels(package).why_not(**facts)

    return reason
