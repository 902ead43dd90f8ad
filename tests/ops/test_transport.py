"""Sinkhorn transport against its definition in float64, and the alignment against single transports."""

import pytest
import torch

from objslot.ops import _backends
from objslot.ops._arithmetic import compute_dtype
from objslot.ops.sinkhorn import sinkhorn_potentials
from objslot.ops.transport import alignment, reference, sinkhorn_transport

BACKENDS = [name for name in ("reference", "cpu") if name in _backends.registered()["sinkhorn_transport"]]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masses(*shape, seed=1):
    mass = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return mass / mass.sum(-1, keepdim=True)


def problem(dtype, n, m, d, c, batch=(2,)):
    x, y, values = tokens(*batch, n, d), tokens(*batch, m, d, seed=3), tokens(*batch, m, c, seed=4)
    a, b = masses(*batch, n), masses(*batch, m, seed=5)
    return [t.to(dtype) for t in (x, y, values)] + [t.to(compute_dtype(dtype)) for t in (a, b)]


def run(function, leaves, **options):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves, **options)
    gradient = tokens(*out.shape, seed=7).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, gradient)


def allowed(own, dtype, exponent):
    """Twice the error of plain PyTorch, or some roundings of exponents of this size and of the result.

    In float64 the oracle itself is no better than the latter.
    """
    rounding = torch.finfo(compute_dtype(dtype)).eps * exponent * (64 if dtype == torch.float64 else 8)
    return max(2 * own, rounding) + 8 * torch.finfo(dtype).eps


def distance(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "d", "c"), [(1, 1, 1, 1), (2, 3, 5, 1), (7, 5, 3, 2), (33, 65, 17, 16), (100, 70, 40, 19)]
)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_values_and_gradients(backend, dtype, n, m, d, c, similarity):
    leaves = problem(dtype, n, m, d, c)
    eps = 0.1 if similarity == "cosine" else 0.4 * d
    options = dict(eps=eps, similarity=similarity)
    wanted = run(reference.sinkhorn_transport, [leaf.double() for leaf in leaves], **options)
    plain = run(reference.sinkhorn_transport, leaves, **options)
    found = run(sinkhorn_transport, leaves, backend=backend, **options)
    for value, own, exact in zip(found, plain, wanted, strict=True):
        assert value.isfinite().all()
        if exact.norm() > 1e-9:
            assert distance(value, exact) <= allowed(distance(own, exact), value.dtype, 1 / eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("eps", "n_iters"), [(1e-3, 3), (1e-3, 30), (10.0, 1)])
def test_extreme_eps(backend, dtype, eps, n_iters):
    leaves = problem(dtype, 40, 30, 8, 3)
    wanted = run(reference.sinkhorn_transport, [leaf.double() for leaf in leaves], eps=eps, n_iters=n_iters)
    plain = run(reference.sinkhorn_transport, leaves, eps=eps, n_iters=n_iters)
    found = run(sinkhorn_transport, leaves, eps=eps, n_iters=n_iters, backend=backend)
    for value, own, exact in zip(found, plain, wanted, strict=True):
        assert value.isfinite().all()
        assert distance(value, exact) <= allowed(distance(own, exact), dtype, 1 / eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_tokens_and_zero_masses_have_finite_gradients(backend):
    leaves = problem(torch.float64, 8, 9, 4, 2)
    leaves[0][0, 2] = leaves[1][1, 3] = 0
    leaves[3][0, 1] = leaves[4][1, 0] = 0
    found = run(sinkhorn_transport, leaves, backend=backend)
    wanted = run(reference.sinkhorn_transport, leaves)
    assert found[0][0, 1].eq(0).all()
    for value, exact in zip(found, wanted, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, exact, rtol=1e-8, atol=1e-10 * exact.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("short", [0.0, 1e-13])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_is_too_short_has_no_direction_and_no_gradient(backend, short, dtype):
    # With one row the plan is given by the columns' masses: all that reaches y is rounding, which must not grow.
    for rows in (1, 20):
        x, y, values = tokens(2, rows, 24), tokens(2, 33, 24, seed=1), tokens(2, 33, 3, seed=2)
        x[1, 0] = y[:, 5] = short
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (x, y, values)]
        moved = sinkhorn_transport(*leaves, eps=1e-3, backend=backend)
        gradients = torch.autograd.grad(moved, leaves, tokens(*moved.shape, seed=3).to(dtype))
        assert all(part.isfinite().all() for part in (moved, *gradients))
        assert gradients[1][:, 5].eq(0).all() and gradients[0][1, 0].eq(0).all()
        assert rows == 1 or gradients[1][:, 6].ne(0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_start_and_a_tolerance_with_the_error_reached(backend):
    x, y, values, a, b = problem(torch.float64, 30, 26, 5, 3, batch=(3,))
    scores = reference.similarity_scores(x, y, "cosine")
    _, g = sinkhorn_potentials(scores, a, b, eps=0.2, n_iters=2)
    leaves = [leaf.requires_grad_() for leaf in (x, y, values, a, b)]
    options = dict(start=g, eps=0.2, n_iters=100, tol=1e-6)
    moved, error = sinkhorn_transport(*leaves, return_error=True, backend=backend, **options)
    exact, exact_error = reference.transport(*leaves, **options)
    assert error.max() <= 1e-6
    assert exact_error.min() > 0, "the case must have something to report"
    torch.testing.assert_close(error, exact_error, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(moved, exact, rtol=1e-9, atol=1e-12)
    gradient = tokens(*moved.shape, seed=7)
    found, wanted = (torch.autograd.grad(out, leaves, gradient) for out in (moved, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_element(backend):
    leaves = problem(torch.float32, 20, 18, 6, 3, batch=(3,))
    leaves[0][1, 4, 2] = float("nan")
    for value in run(sinkhorn_transport, leaves, backend=backend):
        assert value[1].isnan().any()
        assert value[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    x, y, values, a, b = problem(torch.float32, 12, 10, 6, 4, batch=(2, 3))
    wanted = sinkhorn_transport(x, y, values, a, b, backend=backend)
    found = sinkhorn_transport(
        x.mT.contiguous().mT,
        y.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack((values, values), -1)[..., 0],
        torch.stack((a, a), -1)[..., 0],
        b,
        backend=backend,
    )
    torch.testing.assert_close(found, wanted)
    shared = sinkhorn_transport(x, y[:1, :1].expand_as(y), values, a, b[0, 0], backend=backend)
    copied = sinkhorn_transport(
        x, y[:1, :1].expand_as(y).contiguous(), values, a, b[0, 0].expand_as(b).contiguous(), backend=backend
    )
    torch.testing.assert_close(shared, copied)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_and_no_channels(backend):
    out = run(sinkhorn_transport, problem(torch.float32, 4, 5, 3, 2, batch=(0,)), backend=backend)
    assert out[0].shape == (0, 4, 2)
    x, y, values, a, b = problem(torch.float32, 4, 5, 3, 0)
    assert sinkhorn_transport(x, y, values, a, b, backend=backend).shape == (2, 4, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_gradcheck(backend, similarity):
    leaves = [leaf.requires_grad_() for leaf in problem(torch.float64, 3, 4, 5, 2, batch=(2,))]

    def function(*leaves):
        return sinkhorn_transport(*leaves, eps=0.7, similarity=similarity, backend=backend)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    leaves = [leaf.requires_grad_() for leaf in problem(torch.float32, 6, 5, 4, 3)]
    torch.library.opcheck(torch.ops.objslot.sinkhorn_transport, (*leaves, None, 0.1, 3, 1e-3, "cosine", True, backend))
    clip = [tokens(2, 3, 5, 4).float(), tokens(2, 3, 5, 2).float(), masses(2, 3, 5).float()]
    torch.library.opcheck(torch.ops.objslot.alignment, (*clip, 0.1, 3, "cosine", backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend):
    leaves = [leaf.requires_grad_() for leaf in problem(torch.float32, 6, 5, 4, 3)]

    def loss(*leaves):
        return sinkhorn_transport(*leaves, backend=backend).square().sum()

    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(loss(*leaves), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("frames", "n", "d", "c"), [(1, 5, 3, 2), (2, 1, 3, 2), (4, 66, 40, 16), (3, 21, 7, 35)])
@pytest.mark.parametrize("eps", [1e-3, 0.05])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("weighted", [False, True])
def test_alignment_is_the_sum_of_the_transports(backend, dtype, frames, n, d, c, eps, similarity, weighted):
    clip = [tokens(2, frames, n, d).to(dtype), tokens(2, frames, n, c, seed=3).to(dtype)]
    clip.append(masses(2, frames, n).to(compute_dtype(dtype)) if weighted else None)
    options = dict(eps=eps, similarity=similarity)
    exact = reference.alignment(*(None if t is None else t.double() for t in clip), **options)
    own = reference.alignment(*clip, **options)
    found = alignment(*clip, backend=backend, **options)
    assert found.dtype == dtype
    exponent = (1 if similarity == "cosine" else 4 * d) / eps
    assert distance(found, exact) <= allowed(distance(own, exact), dtype, exponent)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_alignment_with_masked_tokens_and_a_pair_out_of_range(backend, dtype):
    clip = [tokens(2, 3, 18, 4), tokens(2, 3, 18, 5, seed=3), masses(2, 3, 18)]
    clip[2][0, 1, 4] = clip[2][1, 0] = 0
    clip[0][1, 2] *= 300
    clip = [t.to(dtype) for t in clip]
    exact = reference.alignment(*(t.double() for t in clip), similarity="dot", eps=0.5)
    found = alignment(*clip, similarity="dot", eps=0.5, backend=backend)
    own = reference.alignment(*clip, similarity="dot", eps=0.5)
    assert distance(found, exact) <= allowed(distance(own, exact), dtype, 1e3)
    assert found[0, 1, 4].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_alignment_of_half_tokens_with_values_in_float32(backend, dtype):
    clip = tokens(2, 4, 35, 40).to(dtype), tokens(2, 4, 35, 6, seed=3).float()
    found, exact = alignment(*clip, backend=backend), reference.alignment(*(t.double() for t in clip))
    assert found.dtype == torch.float32
    assert distance(found, exact) <= 1e-5
    leaf = clip[1].clone().requires_grad_()
    torch.testing.assert_close(alignment(clip[0], leaf, backend=backend).detach(), found, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="values: expected float32"):
        alignment(clip[0].float(), clip[1].to(dtype), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alignment_keeps_nan_in_its_clip(backend):
    clip = [tokens(3, 3, 18, 4).float(), tokens(3, 3, 18, 5, seed=3).float()]
    clip[0][1, 0, 2, 1] = float("nan")
    found = alignment(*clip, backend=backend)
    assert found[1].isnan().any()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_alignment_is_differentiable(backend):
    clip = [tokens(2, 3, 5, 4), tokens(2, 3, 5, 2, seed=3), masses(2, 3, 5)]
    found, wanted = run(alignment, clip, backend=backend), run(reference.alignment, clip)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(x=torch.zeros(4)), ValueError, "x: expected at least 2 dimensions"),
        (dict(y=torch.zeros(3, 5)), ValueError, "y: expected shape"),
        (dict(y=torch.zeros(3, 4).double()), TypeError, "y: expected float32"),
        (dict(values=torch.zeros(2, 7)), ValueError, "values: expected shape"),
        (dict(x=torch.zeros(2, 4).int()), TypeError, "x: expected float16"),
        (dict(x=torch.zeros(0, 4)), ValueError, "x: expected at least one token"),
        (dict(a=torch.ones(3)), ValueError, "a: expected shape"),
        (dict(b=-torch.ones(3)), ValueError, "b: expected no negative entry"),
        (dict(eps=-1), ValueError, "eps: expected a finite number above 0"),
        (dict(n_iters=0), ValueError, "n_iters: expected at least 1"),
        (dict(tol=0.0), ValueError, "tol: expected a finite number above 0"),
        (dict(start=torch.ones(2)), ValueError, "start: expected shape"),
        (dict(similarity="euclidean"), ValueError, "similarity: expected one of"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = dict(x=torch.zeros(2, 4), y=torch.zeros(3, 4), values=torch.zeros(3, 7)) | change
    with pytest.raises(error, match=words):
        sinkhorn_transport(**arguments)
