"""assign by the compiled CPU code."""

import torch
from torch import Tensor

from objslot.ops import _native


def assign(scores: Tensor) -> Tensor:
    """index (..., p), as in `autograd`."""
    *batch, rows, columns = scores.shape
    problems = scores.to(torch.float64).contiguous()
    index = torch.empty((*batch, rows), dtype=torch.int64)
    _native.load().assign(
        problems.data_ptr(), torch.Size(batch).numel(), rows, columns, index.data_ptr(), torch.get_num_threads()
    )
    return index
