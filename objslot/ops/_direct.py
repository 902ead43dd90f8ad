"""Calls of the compiled CPU kernels without PyTorch's dispatcher.

A registered op goes through much code that the kernels before it have driven out of the caches: for a small problem
it takes longer than the kernel.
"""

from functools import cache

import torch
from torch import Tensor, nn

from objslot.ops import _backends, _native


def possible(*tensors: Tensor | None) -> bool:
    """Whether the CPU kernels may be called at once: ordinary CPU tensors, nobody who traces, transforms or
    watches the call, and no backend chosen by name."""
    # First, for torch.compile traces no further.
    if torch.compiler.is_dynamo_compiling():
        return False
    native = _native.load()
    return native is not None and _watching() and native.plain(*tensors)


def transformed() -> bool:
    """Whether a transform of `torch.func` is under way: its tensors do not tell that they require a gradient."""
    return not torch.compiler.is_dynamo_compiling() and torch._C._are_functorch_transforms_active()


@cache
def _watching() -> bool:
    """Tells the module once what to look at."""
    questions = (
        torch._C._len_torch_dispatch_stack,
        torch._C._are_functorch_transforms_active,
        torch._C._get_tracing_state,
    )
    _native.load().watch_for((Tensor, nn.Parameter), questions, _backends.forced)
    return True
