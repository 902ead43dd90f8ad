"""propagate by the compiled CPU kernels."""

import torch
from torch import Tensor

from objslot.ops import _native
from objslot.ops._arithmetic import compute_dtype

ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def why_not(*, dtype, label_dtype, **facts) -> str | None:
    """The row of the table of backends."""
    if compute_dtype(dtype) != compute_dtype(label_dtype):
        return "needs float64 for both features and labels, or for neither"
    return _native.why_not_cpu(**facts)


def forward(
    query: Tensor, keys: Tensor, labels: Tensor, radius: int, topk: int, temperature: float, n_global: int
) -> Tensor:
    """Labels of the query frame, as in `autograd`."""
    *batch, height, width, features = query.shape
    frames, classes = labels.shape[-4], labels.shape[-1]
    mixed = labels.new_empty((*query.shape[:-1], classes))
    query, keys, labels = query.contiguous(), keys.contiguous(), labels.contiguous()
    sizes = [torch.Size(batch).numel(), frames, height, width, features, classes]
    # Neither can reach further than everything there is.
    radius, topk = min(radius, height + width), min(topk, frames * height * width)
    _native.load().propagate(
        [ELEMENTS[query.dtype], ELEMENTS[labels.dtype]],
        sizes,
        [query.data_ptr(), keys.data_ptr(), labels.data_ptr(), mixed.data_ptr()],
        [radius, topk, min(n_global, frames)],
        temperature,
        torch.get_num_threads(),
    )
    return mixed
