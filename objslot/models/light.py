"""Imports without PyTorch's compiler: timm and torchvision load it, with sympy and Triton, to run nothing of it.

It is 170 MB of memory and about two seconds at the start of every command that needs an encoder.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch._compile import _disable_dynamo

_QUESTIONS = "torch._dynamo.utils"


class _Questions(ModuleType):
    """Stands for the compiler's module of the same name until something more than a name of it is wanted."""

    @staticmethod
    def is_compile_supported(device_type):
        return importlib.import_module(_QUESTIONS).is_compile_supported(device_type)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(_QUESTIONS) is self:
            del sys.modules[_QUESTIONS]
        return getattr(importlib.import_module(_QUESTIONS), name)


@contextmanager
def compiler_on_demand() -> Iterator[None]:
    """Imports inside load PyTorch's compiler only where they need more of it than these two, which load it when called.

    torchvision takes the function `is_compile_supported` from a module of the compiler, and timm marks functions as
    not to be compiled with `torch.compiler.disable`.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    stand_in, disable = _Questions(_QUESTIONS), torch.compiler.disable
    sys.modules[_QUESTIONS] = stand_in
    # PyTorch marks its own functions with the lazy form, to the same effect.
    torch.compiler.disable = lambda fn=None, recursive=True, *, reason=None: _disable_dynamo(fn, recursive)
    try:
        yield
    finally:
        torch.compiler.disable = disable
        if sys.modules.get(_QUESTIONS) is stand_in:
            del sys.modules[_QUESTIONS]
