"""Calls of the compiled CPU kernels without PyTorch's dispatcher.

A registered op goes through much code that the kernels before it have driven out of the caches: for a small problem
it takes longer than the kernel.
"""

import torch
from torch import Tensor, nn

from objslot.ops import _backends, _native

_PLAIN = (Tensor, nn.Parameter)


def possible(*tensors: Tensor | None) -> bool:
    """Whether the CPU kernels may be called at once: ordinary CPU tensors, nobody who traces, transforms or
    watches the call, and no backend chosen by name."""
    # First, for torch.compile traces no further.
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and not (type(tensor) in _PLAIN and tensor.is_cpu):
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or _backends.named()
        or _native.load() is None
    )
