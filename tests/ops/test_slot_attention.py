"""slot_attention against plain PyTorch, and at the edges of its domain."""

import pytest
import torch
from slot_cases import DTYPES, check_budget, evaluate, noise, soft_mask

from objslot.errors import BackendError
from objslot.ops import _backends, explain, slot_attention, slot_softmax

BACKENDS = _backends.registered()["slot_attention"]
CPU = [name for name in ("reference", "cpu") if name in BACKENDS]

# (batch, groups, slots, positions, width, value width)
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 16, 196, 64, 64),
    (2, 4, 4, 63, 15, 33),
    (3, 2, 3, 7, 5, 6),
    (1, 3, 17, 130, 24, 40),
    (2, 1, 33, 391, 7, 9),
    (1, 7, 2, 196, 63, 2),
    (1, 1, 130, 70, 16, 100),
    (1, 1, 3, 900, 48, 48),
]


def plain(q, k, v, mask=None, bias=None, eps=1e-8):
    """Slot attention as one would write it, with the logits."""
    logits = torch.einsum("bgpd,bnd->bgpn", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.unsqueeze(-1)
    weights = logits.softmax(-2) + eps
    if mask is not None:
        weights = weights * mask.unsqueeze(-2)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bgpn,bne->bgpe", weights, k if v is None else v), logits


def inputs(shape, *, masked=False, shared=False, biased=False, holes=False):
    batch, groups, slots, positions, width, value_width = shape
    return (
        noise(batch, groups, slots, width),
        noise(batch, positions, width, seed=1),
        None if shared else noise(batch, positions, value_width, seed=2),
        soft_mask(batch, groups, positions, holes=holes) if masked else None,
        noise(batch, groups, slots, seed=3) if biased else None,
    )


def with_logits(backend, eps=1e-8):
    return lambda q, k, v, mask, bias: slot_attention(
        q, k, v, mask, bias=bias, eps=eps, return_logits=True, backend=backend
    )


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", ["plain", "masked", "shared"])
def test_error_budget(backend, dtype, shape, variant):
    arguments = inputs(shape, masked=variant == "masked", shared=variant == "shared", biased=variant != "plain")
    if variant == "masked" and shape[3] == 1:
        pytest.skip("one position: every mask gives the same weights, the gradient is rounding")
    check_budget(with_logits(backend, 1e-3), lambda *x: plain(*x, eps=1e-3), arguments, dtype)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("shape", SHAPES[1:6])
def test_left_out_positions_are_not_read(backend, shape):
    q, k, v, mask, bias = inputs(shape, masked=True, biased=True, holes=True)
    unread = (mask == 0).all(1)
    assert unread.any()
    first = evaluate(with_logits(backend), (q, k, v, mask, bias))
    spoilt = [x.masked_fill(unread.unsqueeze(-1), torch.nan) for x in (k, v)]
    second = evaluate(with_logits(backend), (q, *spoilt, mask, bias))
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)
    updates, logits, _, grad_k, grad_v, grad_mask, _ = first
    assert (updates[0, 0] == 0).all() and (logits.movedim(-1, 1)[unread] == 0).all()
    assert (grad_k[unread] == 0).all() and (grad_v[unread] == 0).all() and (grad_mask[mask == 0] == 0).all()
    # Elsewhere it is the plain formula on what is left.
    for element in range(1, shape[0]):
        kept = ~unread[element]
        wanted, _ = plain(
            q[[element]], k[[element]][:, kept], v[[element]][:, kept], mask[[element]][..., kept], bias[[element]]
        )
        wanted = torch.where((mask[[element]].sum(-1) == 0)[..., None, None], 0, wanted)
        assert torch.allclose(updates[[element]], wanted, atol=1e-12)


@pytest.mark.parametrize("backend", CPU)
def test_equals_softmax_and_product(backend):
    q, k, v, mask, _ = inputs((2, 3, 5, 40, 8, 9), masked=True, holes=True)
    updates, logits = slot_attention(q, k, v, mask, return_logits=True, backend=backend)
    weights = slot_softmax(logits, mask, backend=backend)
    assert torch.allclose(updates, weights @ v.unsqueeze(-3), atol=1e-12)


@pytest.mark.parametrize("backend", CPU)
def test_groups_and_masks_of_ones(backend):
    q, k, v, _, _ = inputs((2, 3, 4, 50, 8, 8))
    together = slot_attention(q, k, v, backend=backend)
    apart = torch.cat([slot_attention(q[:, [g]], k, v, backend=backend) for g in range(3)], dim=1)
    assert torch.allclose(together, apart, atol=1e-12)
    ones = slot_attention(q, k, v, torch.ones(2, 3, 50), backend=backend)
    assert torch.allclose(ones, together, atol=1e-12)
    assert torch.equal(slot_attention(q, k, v, torch.ones(2, 3, 50, dtype=torch.bool), backend=backend), ones)


@pytest.mark.parametrize("backend", CPU)
def test_nan_stays_in_its_batch_element(backend):
    for place in range(3):
        arguments = [x.clone() for x in inputs((3, 2, 4, 100, 8, 8))[:3]]
        arguments[place][1, -1, -1] = torch.nan
        results = evaluate(lambda q, k, v: slot_attention(q, k, v, backend=backend), arguments)
        assert results[0][1].isnan().any()
        assert all(x[[0, 2]].isfinite().all() for x in results)


@pytest.mark.parametrize("backend", CPU)
def test_empty_strided_expanded_and_broadcast(backend):
    q, k, v, mask, _ = inputs((2, 2, 3, 20, 6, 5), masked=True)
    assert slot_attention(q[:0], k[:0], v[:0], backend=backend).shape == (0, 2, 3, 5)
    nothing = slot_attention(q, k[:, :0], v[:, :0], backend=backend)
    assert nothing.shape == (2, 2, 3, 5) and (nothing == 0).all()
    wanted = evaluate(lambda *x: plain(*x)[0], (q, k, v, mask))

    def other_strides(x):
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)

    found = evaluate(
        lambda *x: slot_attention(*(other_strides(y) for y in x), backend=backend), (q, k, v, mask)
    )
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)
    found = evaluate(
        lambda q, k, v: slot_attention(q, k, v.expand(4, 2, 20, 5), backend=backend), (q[0], k, v)
    )
    wanted = evaluate(
        lambda q, k, v: torch.stack([plain(q.expand(2, 2, 3, 6), k, v)[0]] * 4), (q[0], k, v)
    )
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_extreme_logits(backend, scale):
    q, k, v, mask, _ = inputs((2, 2, 3, 65, 6, 5), masked=True)
    results = evaluate(
        lambda *x: slot_attention(*x, scale=scale, backend=backend), [x.float() for x in (q, k, v, mask)]
    )
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("backend", CPU)
def test_second_order_and_registration(backend):
    leaves = [x.requires_grad_() for x in inputs((2, 2, 3, 5, 4, 3), masked=True, biased=True)]
    function = with_logits(backend, eps=1e-2)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    q, k, v, mask, bias = leaves
    torch.library.opcheck(torch.ops.objslot.slot_attention, (*leaves, 0.5, 1e-2, True, backend))
    torch.library.opcheck(torch.ops.objslot.slot_attention, (q, k, None, None, None, 0.5, 1e-2, False, backend))


def test_only_the_gradients_asked_for():
    q, k, v, mask, bias = inputs((2, 2, 3, 90, 8, 5), masked=True, biased=True)
    full = evaluate(with_logits(None), (q, k, v, mask, bias))[2:]
    for place in range(5):
        leaves = [x.clone().requires_grad_(index == place) for index, x in enumerate((q, k, v, mask, bias))]
        results = with_logits(None)(*leaves)
        upper = [noise(*result.shape, seed=77 + index) for index, result in enumerate(results)]
        torch.autograd.backward(results, upper)
        assert torch.equal(leaves[place].grad, full[place])


def test_threads_do_not_change_the_result():
    arguments = [x.float() for x in inputs((2, 1, 5, 1200, 16, 16))[:3]]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(evaluate(lambda *x: slot_attention(*x), arguments))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], others, strict=True))


def test_compile_and_autocast():
    arguments = [x.float() for x in inputs((2, 2, 3, 20, 6, 5), masked=True)[:4]]

    def function(q, k, v, mask):
        return slot_attention(q, k, v, mask) * 2

    for mine, theirs in zip(
        evaluate(torch.compile(function, fullgraph=True), arguments), evaluate(function, arguments), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = slot_attention(*arguments[:3])
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, slot_attention(*(x.bfloat16() for x in arguments[:3])))


@pytest.mark.parametrize("op", [slot_attention, slot_softmax])
def test_backends(op):
    arguments = inputs((1, 1, 3, 5, 4, 4))[:3] if op is slot_attention else (noise(1, 1, 3, 5),)
    with pytest.raises(BackendError, match="needs a CUDA tensor, got one on cpu"):
        op(*arguments, backend="triton")
    assert explain(op, *arguments).chosen == CPU[-1]
    assert explain(op, *arguments, backend="reference").chosen == "reference"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, torch.zeros(5, 4), torch.zeros(5, 4)), {}, TypeError, "q: expected a tensor"),
        ((torch.zeros(1, 3, 4), torch.zeros(5, 6), torch.zeros(5, 4)), {}, ValueError, "k: expected shape"),
        ((torch.zeros(1, 3, 4), torch.zeros(5, 4), torch.zeros(6, 4)), {}, ValueError, "v: expected shape"),
        ((torch.zeros(1, 3, 4), torch.zeros(5, 4).double(), None), {}, TypeError, "k: expected float32"),
        ((torch.zeros(1, 0, 4), torch.zeros(5, 4), None), {}, ValueError, "q: expected at least one of the slots"),
        ((torch.zeros(2, 1, 3, 4), torch.zeros(3, 5, 4), None), {}, ValueError, "broadcast"),
        ((torch.zeros(1, 3, 4), torch.zeros(5, 4), None), {"eps": 0}, ValueError, "eps: expected a finite"),
        ((torch.zeros(1, 3, 4), torch.zeros(5, 4), None), {"scale": -1.0}, ValueError, "scale: expected a finite"),
        ((torch.zeros(1, 3, 4), torch.zeros(5, 4), None, torch.zeros(2, 5)), {}, ValueError, "mask: expected shape"),
        ((torch.zeros(1, 3, 4), torch.zeros(5, 4), None), {"bias": torch.zeros(3, 1)}, ValueError, "bias: expected"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        slot_attention(*arguments, **options)
