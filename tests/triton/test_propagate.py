"""The Triton kernel of label propagation, interpreted, against the plain form in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
triton = pytest.importorskip("triton")

from objslot.ops.propagate import reference, triton_kernels  # noqa: E402


@pytest.mark.parametrize(
    ("dtype", "frames", "height", "width", "features", "classes", "radius", "topk", "n_global"),
    [
        (torch.float32, 2, 5, 6, 7, 3, 2, 4, 1),
        (torch.float32, 1, 2, 40, 18, 33, 3, 1, 0),
        (torch.bfloat16, 2, 3, 9, 8, 2, 9, 5, 0),
        (torch.float16, 1, 2, 3, 40, 1, 2, 50, 2),
    ],
)
def test_propagate(dtype, frames, height, width, features, classes, radius, topk, n_global):
    query = torch.randn(2, height, width, features).to(dtype)
    keys = torch.randn(2, frames, height, width, features).to(dtype)
    labels = torch.rand(2, frames, height, width, classes).softmax(-1).to(dtype)
    settings = (radius, topk, 0.2, n_global)
    wanted = reference.plain(query.double(), keys.double(), labels.double(), *settings)
    own = reference.plain(query, keys, labels, *settings).double()
    found = triton_kernels.forward(query, keys, labels, *settings).double()
    error, plain = (found - wanted).norm() / wanted.norm(), (own - wanted).norm() / wanted.norm()
    assert error <= max(2 * plain, 8 * torch.finfo(dtype).eps), (error, plain)
