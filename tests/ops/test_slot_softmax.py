"""slot_softmax against plain PyTorch, and at the edges of its domain."""

import pytest
import torch
from slot_cases import DTYPES, check_budget, evaluate, noise, soft_mask

from objslot.ops import _backends, slot_softmax

BACKENDS = _backends.registered()["slot_softmax"]
CPU = [name for name in ("reference", "cpu") if name in BACKENDS]


def plain(logits, mask=None, eps=1e-8):
    weights = logits.softmax(-2) + eps
    if mask is not None:
        weights = weights * mask.unsqueeze(-2)
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 16, 196), (2, 3, 5, 63), (1, 2, 7, 391), (3, 15, 2, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_error_budget(backend, dtype, shape, masked):
    if masked and shape[3] == 1:
        pytest.skip("one position: every mask gives the same weights, the gradient is rounding")
    mask = soft_mask(shape[0], shape[1], shape[3], holes=False) if masked else None
    check_budget(
        lambda logits, mask: slot_softmax(logits, mask, eps=1e-3, backend=backend),
        lambda logits, mask: plain(logits, mask, eps=1e-3),
        (noise(*shape) * 3, mask),
        dtype,
    )


@pytest.mark.parametrize("backend", CPU)
def test_left_out_positions(backend):
    logits, mask = noise(2, 3, 4, 9), soft_mask(2, 3, 9)
    first = evaluate(lambda x, m: slot_softmax(x, m, backend=backend), (logits, mask))
    left_out = (mask == 0).unsqueeze(-2).expand_as(logits)
    assert (first[0][left_out] == 0).all() and (first[1][left_out] == 0).all() and (first[2][mask == 0] == 0).all()
    assert (first[0][0, 0] == 0).all()
    kept = mask.sum(-1) > 0
    assert torch.allclose(first[0].sum(-1)[kept], torch.ones(()).double())
    spoiled = evaluate(
        lambda x, m: slot_softmax(x, m, backend=backend), (logits.masked_fill(left_out, torch.nan), mask)
    )
    for before, after in zip(first, spoiled, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("backend", CPU)
def test_nan_stays_in_its_batch_element(backend):
    logits = noise(3, 2, 4, 9)
    logits[1, 0, 2, 3] = torch.nan
    weights = slot_softmax(logits, backend=backend)
    assert weights[1, 0].isnan().any() and weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", CPU)
def test_empty_extreme_and_strided(backend):
    assert slot_softmax(torch.empty(0, 1, 3, 5), backend=backend).shape == (0, 1, 3, 5)
    assert slot_softmax(torch.empty(2, 1, 3, 0), backend=backend).shape == (2, 1, 3, 0)
    extreme = slot_softmax(noise(2, 1, 4, 7).float() * 1e4, backend=backend)
    assert extreme.isfinite().all()
    logits = noise(4, 7, 1, 2).permute(3, 2, 0, 1)
    expanded = noise(1, 1, 4, 7).expand(2, 1, 4, 7)
    for x in (logits, expanded):
        assert torch.allclose(slot_softmax(x, backend=backend), plain(x))


@pytest.mark.parametrize("backend", CPU)
def test_second_order_and_registration(backend):
    logits, mask = noise(2, 2, 3, 4).requires_grad_(), soft_mask(2, 2, 4, holes=False).requires_grad_()

    def op(logits, mask):
        return slot_softmax(logits, mask, eps=1e-2, backend=backend)

    assert torch.autograd.gradcheck(op, (logits, mask), fast_mode=True)
    assert torch.autograd.gradgradcheck(op, (logits, mask), fast_mode=True)
    torch.library.opcheck(torch.ops.objslot.slot_softmax, (logits, mask, 1e-2, backend))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("x",), TypeError, "logits: expected a tensor"),
        ((torch.zeros(3, 5),), ValueError, "logits: expected at least 3 dimensions"),
        ((torch.zeros(1, 3, 5, dtype=torch.int64),), TypeError, "logits: expected float16"),
        ((torch.zeros(1, 0, 5),), ValueError, "logits: expected at least one of the slots"),
        ((torch.zeros(1, 3, 5), torch.zeros(1, 4)), ValueError, "mask: expected shape"),
        ((torch.zeros(1, 3, 5), torch.zeros(1, 5, dtype=torch.int32)), TypeError, "mask: expected float16"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        slot_softmax(*arguments)


def test_bad_eps():
    with pytest.raises(ValueError, match="eps: expected a finite number above 0"):
        slot_softmax(torch.zeros(1, 3, 5), eps=0.0)
