"""Autocast around an op: its arguments are cast like those of a matrix product, its inside is left alone."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast hands them to a matrix product: float64 stays, where it is off all stay."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    low = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if x is not None and x.dtype in low else x for x in tensors)


def disabled(device: torch.device) -> AbstractContextManager:
    """A context in which plain PyTorch computes in the dtypes it is given."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
