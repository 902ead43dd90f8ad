"""The dtype in which an op computes."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half types, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
