"""The Triton kernels of Sinkhorn transport, interpreted, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
triton = pytest.importorskip("triton")

from objslot.ops.transport import reference, triton_kernels  # noqa: E402

# What a result may be off by where plain PyTorch happens to be exact, relative to its norm.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(found, wanted, own, rounding):
    """At most twice the error that plain PyTorch makes in the same dtype."""
    assert found.shape == wanted.shape
    size = wanted.norm().clamp_min(1e-30)
    error, plain = ((value.double() - wanted).norm() / size for value in (found, own))
    assert error <= max(2 * plain, rounding), (error, plain)


@pytest.mark.parametrize(
    ("dtype", "n", "m", "width", "values", "similarity", "eps", "n_iters"),
    [
        (torch.float32, 40, 37, 20, 3, "cosine", 0.05, 2),
        (torch.float32, 5, 70, 33, 70, "dot", 1.0, 1),
        (torch.float16, 70, 5, 8, 5, "cosine", 0.1, 2),
        (torch.bfloat16, 16, 20, 8, 4, "cosine", 0.05, 3),
        (torch.bfloat16, 7, 9, 8, 4, "dot", 1.0, 2),
        (torch.float32, 9, 7, 8, 1, "cosine", 1e-3, 2),
    ],
)
@pytest.mark.parametrize("masses", [False, True])
def test_transport(dtype, n, m, width, values, similarity, eps, n_iters, masses, started=False):
    x, y, carried = torch.randn(1, n, width), torch.randn(1, m, width), torch.randn(1, m, values)
    if similarity == "cosine" and dtype != torch.float16:
        # Its gradient is too large for float16.
        x[0, 2] = 0
    a = b = None
    if masses:
        a, b = torch.rand(1, n) + 0.1, torch.rand(1, m) + 0.1
        a[0, 1], b[0, 3] = 0, 0
        a, b = a / a.sum(), b / b.sum()
    tensors = [x.to(dtype), y.to(dtype), carried.to(dtype), a, b]
    start = torch.randn(1, m) if started else None

    def plain(*tensors):
        leaves = [None if t is None else t.requires_grad_() for t in tensors]
        moved = reference.sinkhorn_transport(*leaves, start, eps=eps, n_iters=n_iters, similarity=similarity)
        held = [t for t in leaves if t is not None]
        return moved.detach(), *torch.autograd.grad(moved, held, grad.to(moved.dtype))

    grad = torch.randn(1, n, values).to(dtype)
    wanted = plain(*(None if t is None else t.double() for t in tensors))
    own = plain(*(None if t is None else t.clone() for t in tensors))
    found = [
        triton_kernels.forward(*tensors, start, eps, n_iters, None, similarity, False)[0],
        *(t for t in triton_kernels.backward(grad, *tensors, start, eps, n_iters, None, similarity) if t is not None),
    ]
    scores = reference.similarity_scores(x.double(), y.double(), similarity)
    exponents = 2 * torch.finfo(torch.float32).eps * scores.abs().max() / eps
    for value, exact, mine in zip(found, wanted, own, strict=True):
        close(value, exact, mine, ROUNDING[dtype] + exponents)


@pytest.mark.parametrize("n_iters", [1, 2])
def test_a_start(n_iters):
    test_transport(torch.float32, 20, 37, 8, 3, "cosine", 0.05, n_iters, True, started=True)


def test_alignment_is_the_sum_over_the_other_frames():
    tokens, values = torch.randn(1, 3, 9, 8), torch.randn(1, 3, 9, 4)
    masses = torch.rand(1, 3, 9) + 0.1
    masses /= masses.sum(-1, keepdim=True)
    wanted = reference.alignment(*(t.double() for t in (tokens, values, masses)))
    own = reference.alignment(tokens, values, masses)
    close(triton_kernels.alignment(tokens, values, masses, 0.05, 3, "cosine"), wanted, own, 2e-6)
    assert not triton_kernels.alignment(tokens[:, :1], values[:, :1], None, 0.05, 3, "cosine").any()
