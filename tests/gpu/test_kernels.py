"""Every GPU kernel against float64: an error of at most twice that of plain PyTorch on the same device and dtype.

pytest -m gpu tests/gpu
"""

import pytest
import torch

import objslot
from objslot.ops.propagate import reference as propagate_reference
from objslot.ops.sinkhorn import reference as sinkhorn_reference
from objslot.ops.slot_attention import reference as attention_reference
from objslot.ops.slot_softmax import reference as softmax_reference
from objslot.ops.transport import reference as transport_reference

pytestmark = pytest.mark.gpu

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masses(*shape, seed=0, holes=False):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1
    if holes:
        mass[..., 1] = 0
    return mass / mass.sum(-1, keepdim=True)


def cosines(*shape, seed=0):
    *batch, n, m = shape
    unit = torch.nn.functional.normalize
    return unit(noise(*batch, n, 8, seed=seed), dim=-1) @ unit(noise(*batch, m, 8, seed=seed + 1), dim=-1).mT


def run(function, inputs):
    """Results and the gradients of all inputs, for fixed upper gradients."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    upper = [noise(*r.shape, seed=9 + place).to(r) for place, r in enumerate(results)]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, [x for x in leaves if x is not None], upper)]


def check(op, plain, inputs, dtype, exponent=0.0):
    """`inputs` are (tensor in float64, "cast" or "arithmetic"): a marginal keeps the dtype of the arithmetic."""
    arithmetic = dtype if dtype == torch.float64 else torch.float32
    rounded = [
        None if x is None else x.to("cuda", dtype if kind == "cast" else arithmetic) for x, kind in inputs
    ]
    exact = run(plain, [None if x is None else x.double() for x in rounded])
    found, own = run(op, rounded), run(plain, rounded)
    for place, (mine, theirs, wanted) in enumerate(zip(found, own, exact, strict=True)):
        assert mine.shape == wanted.shape and mine.isfinite().all(), place
        size = wanted.norm().clamp_min(1e-30)
        error, plain_error = ((x.double() - wanted).norm().div(size).item() for x in (mine, theirs))
        allowed = max(2 * plain_error, exponent * torch.finfo(arithmetic).eps) + 8 * torch.finfo(mine.dtype).eps
        assert error <= allowed, (place, error, plain_error)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 200])
@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (7, 3), (63, 64), (128, 36), (196, 196), (256, 256), (256, 255), (391, 1620)]
)
@pytest.mark.parametrize(("eps", "n_iters"), [(0.05, 3), (1e-3, 2), (10.0, 20)])
def test_sinkhorn(backend, dtype, batch, n, m, eps, n_iters):
    if batch * n * m > 2e7 or (backend == "cuda" and (dtype == torch.float64 or max(n, m) > 256)):
        pytest.skip("beyond the kernel or the memory of the oracle")

    def op(scores, a, b):
        return objslot.sinkhorn(scores, a, b, eps=eps, n_iters=n_iters, backend=backend)

    def plain(scores, a, b):
        return sinkhorn_reference.sinkhorn(scores, a, b, eps=eps, n_iters=n_iters)[0]

    holes = min(n, m) > 2
    a, b = masses(batch, n, seed=3, holes=holes), masses(batch, m, seed=4, holes=holes)
    check(op, plain, [(cosines(batch, n, m), "cast"), (a, ""), (b, "")], dtype, 4 / eps)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("size", [40, 200])
@pytest.mark.parametrize("batch", [2, 150])
def test_sinkhorn_stops_and_reports(backend, size, batch):
    scores = cosines(batch, size, size).float().cuda()
    plan, error = objslot.sinkhorn(
        scores, eps=0.1, n_iters=100, tol=1e-3, return_error=True, backend=backend
    )
    wanted, reached = sinkhorn_reference.sinkhorn(scores.double(), eps=0.1, n_iters=100, tol=1e-3)
    assert (error <= 1e-3).all()
    torch.testing.assert_close(error.double(), reached, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(plan.double(), wanted, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_sinkhorn_potentials_nan_and_strides(backend):
    scores = cosines(3, 33, 70).float().cuda().mT
    f, g = objslot.sinkhorn_potentials(scores, backend=backend)
    plan = objslot.sinkhorn(scores, backend=backend)
    torch.testing.assert_close((scores / 0.05 + f[..., None] + g[..., None, :]).exp(), plan, rtol=1e-4, atol=1e-9)
    broken = scores.clone()
    broken[1, 2, 3] = torch.nan
    found = objslot.sinkhorn(broken, backend=backend)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], plan[[0, 2]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(("n", "m", "d", "c"), [(256, 256, 384, 16), (1620, 391, 64, 70), (7, 3, 5, 1)])
def test_transport(dtype, similarity, n, m, d, c):
    eps = 0.05 if similarity == "cosine" else 4.0

    def op(x, y, values, a):
        return objslot.sinkhorn_transport(x, y, values, a, eps=eps, similarity=similarity, backend="triton")

    def plain(x, y, values, a):
        return transport_reference.sinkhorn_transport(x, y, values, a, eps=eps, similarity=similarity)

    tensors = [(noise(2, n, d), "cast"), (noise(2, m, d, seed=1), "cast"), (noise(2, m, c, seed=2), "cast")]
    check(op, plain, [*tensors, (masses(2, n), "")], dtype, 4 / eps)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("groups", "slots", "positions", "width"), [(1, 1, 7, 5), (1, 16, 256, 384), (16, 4, 256, 384), (1, 100, 391, 64)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_slot_attention(dtype, groups, slots, positions, width, masked):
    q, k, v = noise(2, groups, slots, width), noise(2, positions, width, seed=1), noise(2, positions, width, seed=2)
    mask = masses(2, groups, positions, holes=True) * positions if masked else None

    def op(q, k, v, mask):
        return objslot.slot_attention(q, k, v, mask, backend="triton")

    def plain(q, k, v, mask):
        updates = attention_reference.slot_attention(q, k, v, mask, None, width**-0.5, 1e-8)[0]
        return updates.to(q.dtype)

    check(op, plain, [(x, "cast") for x in (q, k, v, mask)], dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("slots", "positions"), [(1, 7), (4, 256), (200, 391)])
def test_slot_softmax(dtype, slots, positions):
    def op(logits, mask):
        return objslot.slot_softmax(logits, mask, backend="triton")

    def plain(logits, mask):
        return softmax_reference.slot_softmax(logits, mask, 1e-8)[0].to(logits.dtype)

    mask = masses(2, 3, positions, holes=True) * positions
    check(op, plain, [(noise(2, 3, slots, positions), "cast"), (mask, "cast")], dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("height", "width", "topk", "radius"), [(5, 7, 3, 2), (30, 54, 28, 9)])
def test_propagate(dtype, height, width, topk, radius):
    query, keys = noise(height, width, 48), noise(3, height, width, 48, seed=1)
    labels = noise(3, height, width, 4, seed=2).softmax(-1)
    settings = (radius, topk, 0.2, 1)
    cast = [x.to("cuda", dtype) for x in (query, keys, labels)]
    wanted = propagate_reference.bounded(*(x.double() for x in cast), *settings)
    own = propagate_reference.bounded(*cast, *settings)
    found = objslot.propagate(
        *cast, radius=radius, topk=topk, temperature=0.2, n_global=1, backend="triton"
    )
    error, plain = ((x.double() - wanted).norm() / wanted.norm() for x in (found, own))
    assert error <= max(2 * plain, 8 * torch.finfo(dtype).eps), (error, plain)


@pytest.mark.parametrize("size", [(3, 3), (4, 5)])
def test_assign_stays_on_the_device(size):
    scores = noise(512, *size).cuda()
    objslot.assign(scores)
    with torch.cuda.device_of(scores):
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = objslot.assign(scores)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), objslot.assign(scores.cpu()))
