"""The Triton kernels of Sinkhorn, interpreted, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
triton = pytest.importorskip("triton")

from objslot.ops.sinkhorn import reference, triton_kernels  # noqa: E402

# Two-kernel iterations, one program for a matrix with tiles streamed, and resident.
FORMS = ("divided", "streamed", "resident")


@pytest.fixture
def form(request, monkeypatch):
    """Makes small matrices take the path of large ones."""
    if request.param != "resident":
        monkeypatch.setattr(triton_kernels, "TILE", 128)
    monkeypatch.setattr(triton_kernels, "LARGE_BATCH", 1 if request.param != "divided" else 1000)
    return request.param


def problem(dtype, n, m, scale=1.0, holes=False):
    scores = (torch.rand(2, n, m, dtype=torch.float64) * 2 - 1).mul(scale).to(dtype)
    a, b = torch.rand(2, n).double() + 0.1, torch.rand(2, m).double() + 0.1
    if holes:
        a[0, 1], b[0, 2], b[1, 0] = 0, 0, 0
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    return scores, (a / a.sum(-1, keepdim=True)).to(arithmetic), (b / b.sum(-1, keepdim=True)).to(arithmetic)


def oracle(scores, a, b, gradient, eps, n_iters, tol=None):
    leaves = [x.detach().double().requires_grad_() for x in (scores, a, b)]
    found = reference.scalings(*leaves, eps=eps, n_iters=n_iters, tol=tol)
    plan = reference.plan(leaves[0], found.f[-1], found.g[-1], eps=eps)
    grads = torch.autograd.grad(plan, leaves, gradient.double())
    return plan.detach(), found, grads


def close(found, wanted, budget, terms=None):
    """Within `budget` of the largest entry, or of the largest of the terms that cancelled."""
    assert found.shape == wanted.shape
    found = found.double()
    assert (found.isfinite() == wanted.isfinite()).all()
    finite = wanted.isfinite()
    size = wanted.abs()[finite].max()
    if terms is not None:
        size = torch.maximum(size, terms.max())
    error = (found - wanted).abs()[finite].max()
    assert error <= budget * size, error / size


def budget(dtype, eps, scores):
    """Rounding of the result and of the exponents, over a few iterations."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = scores.abs().max().item() / eps + 8
    return 4 * torch.finfo(dtype).eps + 4 * exponent * torch.finfo(arithmetic).eps


def solve(scores, a, b, eps, n_iters, tol=None):
    return triton_kernels.forward(scores, a, b, None, eps, n_iters, tol, True, True, True)


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize(
    ("dtype", "n", "m", "eps", "scale", "n_iters", "holes"),
    [
        (torch.float32, 21, 33, 0.05, 1.0, 3, False),
        (torch.float64, 7, 15, 0.05, 1.0, 3, True),
        (torch.bfloat16, 16, 18, 0.05, 1.0, 2, False),
        (torch.float16, 5, 3, 10.0, 1.0, 1, True),
        (torch.float32, 12, 20, 1e-3, 1.0, 4, True),
        (torch.float32, 6, 9, 0.05, 1e4, 3, False),
    ],
)
def test_plan_and_gradients(form, dtype, n, m, eps, scale, n_iters, holes):
    scores, a, b = problem(dtype, n, m, scale, holes)
    gradient = torch.randn(2, n, m).to(dtype)
    wanted, right, grads = oracle(scores, a, b, gradient, eps, n_iters)
    found = solve(scores, a, b, eps, n_iters)
    allowed = budget(dtype, eps, scores)
    close(found["plan"], wanted, allowed)
    torch.testing.assert_close(found["error"].double(), right.error, rtol=1e-2, atol=allowed)
    history = [found[key] for key in ("history_f", "history_g", "count")]
    mine = triton_kernels.backward(
        gradient, None, None, scores, a, b, None, found["plan"], *history, eps, n_iters, None
    )
    moved = wanted * gradient.double().abs()
    terms = moved / eps, moved.sum(-1) / a.clamp_min(1e-9), moved.sum(-2) / b.clamp_min(1e-9)
    for value, exact, size in zip(mine, grads, terms, strict=True):
        close(value, exact, 4 * allowed, size)


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_an_element_stops_at_the_tolerance(form):
    scores, a, b = problem(torch.float32, 12, 20)
    scores[1] *= 0.1
    _, right, _ = oracle(scores, a, b, torch.ones_like(scores), 0.2, 30, 1e-3)
    found = solve(scores, a, b, 0.2, 30, 1e-3)
    assert found["count"].tolist() == right.count.tolist()
    assert len(set(right.count.tolist())) == 2 and max(right.count) < 30
    torch.testing.assert_close(found["error"].double(), right.error, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_potentials_their_gradients_and_uniform_masses(form):
    scores, _, _ = problem(torch.float32, 11, 18)
    leaf = scores.double().requires_grad_()
    right = reference.scalings(leaf, None, None, eps=0.1, n_iters=2)
    found = triton_kernels.forward(scores, None, None, None, 0.1, 2, None, False, False, False)
    close(found["f"], right.f[-1].detach(), 1e-6)
    close(found["g"], right.g[-1].detach(), 1e-6)
    grads = torch.randn(2, 11), torch.randn(2, 18)
    (wanted,) = torch.autograd.grad((right.f[-1], right.g[-1]), leaf, [g.double() for g in grads])
    found = triton_kernels.forward(scores, None, None, None, 0.1, 2, None, True, False, False)
    history = [found[key] for key in ("history_f", "history_g", "count")]
    mine = triton_kernels.backward(None, *grads, scores, None, None, None, None, *history, 0.1, 2, None)
    assert mine[1] is None and mine[2] is None
    close(mine[0], wanted, 1e-5)


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_nan_stays_in_its_element(form):
    scores, a, b = problem(torch.float32, 11, 18)
    clean = solve(scores, a, b, 0.1, 2)["plan"]
    scores[1, 3, 4] = torch.nan
    plan = solve(scores, a, b, 0.1, 2)["plan"]
    assert torch.equal(plan[0], clean[0]) and plan[1].isnan().all()


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_any_strides(form):
    wide = torch.randn(2, 18, 22)
    scores, a, b = wide.mT[:, ::2], torch.full((1, 11), 1 / 11).expand(2, 11), None
    found = solve(scores, a, b, 0.3, 2)["plan"]
    assert torch.equal(found, solve(scores.contiguous(), a.contiguous(), b, 0.3, 2)["plan"])
