"""How ops compute, whatever the backend: their dtype, and where a length counts as zero."""

import torch

# A token shorter than this counts as zero: it has cosine 0 with everything.
SHORTEST = 1e-12


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half types, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
