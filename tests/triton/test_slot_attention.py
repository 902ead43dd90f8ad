"""The Triton kernels on slots, interpreted, against the references in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
triton = pytest.importorskip("triton")

from objslot.ops.slot_attention import reference as attention_reference  # noqa: E402
from objslot.ops.slot_attention import triton_kernels as attention  # noqa: E402
from objslot.ops.slot_softmax import reference as softmax_reference  # noqa: E402
from objslot.ops.slot_softmax import triton_kernels as softmax  # noqa: E402

EPS = 1e-3


def close(found, wanted, dtype):
    budget = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert found.shape == wanted.shape
    assert (found.double() - wanted).norm() <= budget * wanted.norm().clamp_min(1e-6)


def holes(mask):
    mask = mask * (torch.rand_like(mask) > 0.3)
    mask[..., 3:6] = 0
    mask[0, 0] = 0
    return mask


@pytest.mark.parametrize(
    ("dtype", "groups", "slots", "positions", "width", "values"),
    [
        (torch.float32, 1, 5, 40, 8, 20),
        (torch.float32, 3, 4, 33, 70, 70),
        (torch.float32, 2, 1, 7, 3, 130),
        (torch.float32, 1, 17, 300, 16, 16),
        (torch.bfloat16, 3, 4, 33, 70, 70),
        (torch.float16, 3, 4, 33, 70, 70),
    ],
)
@pytest.mark.parametrize("variant", ["plain", "masked", "shared"])
def test_slot_attention(dtype, groups, slots, positions, width, values, variant):
    shared = variant == "shared"
    q, k = torch.randn(2, groups, slots, width).to(dtype), torch.randn(2, positions, width).to(dtype)
    v = None if shared else torch.randn(2, positions, values).to(dtype)
    mask = holes(torch.rand(2, groups, positions) + 0.1).to(dtype) if variant == "masked" else None
    bias = None if variant == "plain" else torch.randn(2, groups, slots).to(dtype)
    exact = [None if x is None else x.double() for x in (q, k, v, mask, bias)]
    if mask is not None:
        unread = (mask == 0).all(1)
        k[unread], v[unread] = torch.nan, torch.nan
    scale = width**-0.5
    updates, logits, mass = attention.forward(q, k, v, mask, bias, scale, EPS, True)
    wanted = attention_reference.slot_attention(*exact, scale, EPS)
    for found, right in zip((updates, logits, mass), wanted, strict=True):
        close(found, right, dtype)
    grads = torch.randn_like(updates), torch.randn_like(logits)
    needs = [x is not None for x in exact]
    found = attention.backward(*grads, q, k, v, mask, bias, updates, mass, scale, EPS, needs)
    wanted = attention_reference.slot_attention_backward(*(x.double() for x in grads), *exact, scale, EPS)
    for mine, right in zip(found, wanted, strict=True):
        if right is not None:
            close(mine, right, dtype)


def test_only_what_is_asked_for():
    q, k, v = torch.randn(2, 1, 4, 8), torch.randn(2, 40, 8), torch.randn(2, 40, 8)
    updates, logits, mass = attention.forward(q, k, v, None, None, 0.5, EPS, False)
    assert logits.numel() == 0
    grad = torch.randn_like(updates)
    exact = [x.double() for x in (q, k, v)]
    wanted = attention_reference.slot_attention_backward(grad.double(), None, *exact, None, None, 0.5, EPS)
    for needs in ([True, False, False], [False, True, False], [False, False, True]):
        found = attention.backward(
            grad, None, q, k, v, None, None, updates, mass, 0.5, EPS, [*needs, False, False]
        )
        for mine, right, wanted_it in zip(found, wanted, needs, strict=False):
            assert mine.numel() == 0 if not wanted_it else True
            if wanted_it:
                close(mine, right, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("slots", "positions"), [(1, 1), (5, 63), (16, 300)])
@pytest.mark.parametrize("masked", [False, True])
def test_slot_softmax(dtype, slots, positions, masked):
    logits = torch.randn(2, 3, slots, positions).to(dtype)
    mask = holes(torch.rand(2, 3, positions) + 0.1).to(dtype) if masked else None
    exact = logits.double(), None if mask is None else mask.double()
    if masked:
        logits = logits.masked_fill((mask == 0).unsqueeze(-2), torch.nan)
    weights, mass = softmax.forward(logits, mask, EPS)
    wanted = softmax_reference.slot_softmax(*exact, EPS)
    close(weights, wanted[0], dtype)
    close(mass, wanted[1], dtype)
    grad = torch.randn_like(logits)
    found = softmax.backward(grad, logits, mask, mass, EPS, masked)
    wanted = softmax_reference.slot_softmax_backward(grad.double(), *exact, EPS, masked)
    if positions > 1:
        close(found[0], wanted[0], dtype)
        if masked:
            close(found[1], wanted[1], dtype)
