"""Sinkhorn against closed forms, and at the edges of its domain."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sinkhorn_cases import BACKENDS, DTYPES, check, cosines, distance, guarded, masses

from objslot.ops import _backends, _native
from objslot.ops._arithmetic import compute_dtype
from objslot.ops.sinkhorn import reference, sinkhorn, sinkhorn_potentials


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_element_that_underflows_does_not_change_its_neighbours(backend):
    scores = cosines(4, 33, 35).float()
    scores[2] *= 1e3
    whole = sinkhorn(scores, backend=backend)
    for index in range(4):
        assert torch.equal(whole[index], sinkhorn(scores[index], backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_are_exact_and_rows_converge(backend, dtype):
    plan, error = sinkhorn(cosines(2, 30, 20).to(dtype), eps=0.5, n_iters=50, return_error=True, backend=backend)
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(
        plan.double().sum(-2), torch.full((2, 20), 1 / 20).double(), rtol=4 * precision, atol=1e-6
    )
    assert (error <= 4 * torch.finfo(error.dtype).eps + 1e-9).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_error_is_the_mass_missing_from_the_rows(backend):
    scores = cosines(3, 12, 17)
    plan, error = sinkhorn(scores, eps=0.02, n_iters=2, return_error=True, backend=backend)
    torch.testing.assert_close(error, (plan.sum(-1) - 1 / 12).abs().sum(-1), rtol=1e-9, atol=1e-15)
    assert error.min() > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_scores_give_the_outer_product(backend):
    a, b = masses(2, 9), masses(2, 6, seed=3)
    plan = sinkhorn(torch.full((2, 9, 6), 3.0).double(), a, b, backend=backend)
    torch.testing.assert_close(plan, a.unsqueeze(-1) * b.unsqueeze(-2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clear_permutation_is_found(backend):
    permutation = torch.tensor([3, 1, 4, 0, 2])
    plan = sinkhorn(torch.eye(5)[permutation], eps=1e-3, backend=backend)
    torch.testing.assert_close(plan, torch.eye(5)[permutation] / 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dirac_column_takes_everything(backend):
    a = masses(7).float()
    b = torch.zeros(4)
    b[2] = 1
    plan = sinkhorn(cosines(7, 4).float(), a, b, backend=backend)
    torch.testing.assert_close(plan[:, 2], a)
    assert plan[:, [0, 1, 3]].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [1e-3, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_mass_is_masked_and_has_no_gradient(backend, eps, dtype):
    scores = cosines(2, 10, 12).to(dtype)
    a, b = masses(2, 10).to(dtype), masses(2, 12, seed=3).to(dtype)
    a[0, 3] = a[1, 0] = b[0, 11] = 0
    check(backend, dtype, scores, a, b, eps, 3, guarded)
    leaves = [tensor.requires_grad_() for tensor in (scores, a, b)]
    plan = sinkhorn(*leaves, eps=eps, backend=backend)
    grads = torch.autograd.grad(plan.square().sum(), leaves)
    assert plan[0, 3].eq(0).all()
    assert plan[0, :, 11].eq(0).all()
    assert grads[0][0, 3].eq(0).all()
    assert grads[1][1, 0] == grads[2][0, 11] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["a", "b", "both"])
def test_no_mass_at_all_gives_zeros(backend, side):
    scores = cosines(2, 5, 6).requires_grad_()
    a = torch.zeros(5).double() if side != "b" else None
    b = torch.zeros(6).double() if side != "a" else None
    plan = sinkhorn(scores, a, b, backend=backend)
    assert plan.eq(0).all()
    assert torch.autograd.grad(plan.sum(), scores)[0].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["scores", "a", "b"])
def test_nan_stays_in_its_element(backend, dtype, where):
    tensors = {"scores": cosines(3, 20, 24), "a": masses(3, 20), "b": masses(3, 24, seed=3)}
    tensors[where][1].view(-1)[5] = float("nan")
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors.values()]
    plan = sinkhorn(*leaves, backend=backend)
    grads = torch.autograd.grad(plan.float().square().sum(), leaves)
    assert plan[1].isnan().any()
    for value in (plan, *grads):
        assert value[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_of_minus_infinity_is_never_used(backend):
    scores = cosines(2, 8, 9).float()
    scores[0, 2, 3] = scores[1, 5] = float("-inf")
    scores.requires_grad_()
    plan = sinkhorn(scores, backend=backend)
    torch.autograd.backward(plan, torch.ones_like(plan))
    wanted, _ = reference.sinkhorn(scores.detach().double())
    torch.testing.assert_close(plan.double(), wanted, rtol=1e-5, atol=1e-9)
    assert plan[0, 2, 3] == 0
    assert plan[1, 5].eq(0).all()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_leading_dimensions(backend, dtype):
    base = cosines(2, 3, 18, 14).to(dtype)
    wanted = sinkhorn(base, backend=backend)
    padded = torch.full((2, 3, 20, 33), float("nan"), dtype=dtype)
    padded[..., 1:19, 2:30:2] = base
    for view in (
        padded[..., 1:19, 2:30:2],
        base.mT.contiguous().mT,
        base.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        torch.testing.assert_close(sinkhorn(view, backend=backend), wanted)
    expanded = sinkhorn(base[:1, :1].expand(2, 3, 18, 14), backend=backend)
    torch.testing.assert_close(expanded, wanted[:1, :1].expand(2, 3, 18, 14))
    torch.testing.assert_close(sinkhorn(base[1, 2], backend=backend), wanted[1, 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_marginals_and_gradients_may_be_expanded(backend):
    scores = cosines(2, 3, 11, 13).requires_grad_()
    a, b = masses(3, 11).requires_grad_(), masses(13, seed=3).requires_grad_()
    plan = sinkhorn(scores, a, b, backend=backend)
    found = torch.autograd.grad(plan.sum(), (scores, a, b))
    wanted, _ = reference.sinkhorn(scores, a, b)
    torch.testing.assert_close(plan, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.sum(), (scores, a, b)), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    scores = torch.zeros(2, 0, 3, 4, requires_grad=True)
    plan, error = sinkhorn(scores, return_error=True, backend=backend)
    assert plan.shape == (2, 0, 3, 4)
    assert error.shape == (2, 0)
    assert torch.autograd.grad(plan.sum(), scores)[0].shape == scores.shape


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("shape", [(1, 300, 290), (5, 130, 70)])
def test_the_result_does_not_depend_on_the_threads(backend, threads, shape):
    scores = cosines(*shape).float().requires_grad_()
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    results = []
    before = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            plan = sinkhorn(scores, backend=backend)
            results.append((plan.detach(), *torch.autograd.grad(plan, scores, gradient)))
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [1024, 1029])
def test_results_beyond_the_caches_are_written_where_they_belong(backend, columns):
    """Past the caches in whole vectors, which rows of 1029 columns do not begin at."""
    scores = cosines(1, 1030, columns)
    check(backend, torch.float32, scores, masses(1, 1030), masses(1, columns, seed=2), 0.05, 12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-3, 0.05])
def test_potentials_rebuild_the_plan(backend, dtype, eps):
    scores = cosines(2, 21, 34).to(dtype)
    f, g = sinkhorn_potentials(scores, eps=eps, backend=backend)
    assert f.dtype == g.dtype == compute_dtype(dtype)
    found = reference.scalings(scores.double(), None, None, eps=eps, n_iters=3)
    scale = scores.abs().max().item() / eps
    torch.testing.assert_close(f.double(), found.f[-1], rtol=0, atol=4 * scale * torch.finfo(f.dtype).eps)
    torch.testing.assert_close(g.double(), found.g[-1], rtol=0, atol=4 * scale * torch.finfo(f.dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [2e-3, 0.2])
def test_gradients_of_the_potentials(backend, eps):
    leaves = [cosines(2, 9, 7).requires_grad_(), masses(2, 9).requires_grad_(), masses(2, 7).requires_grad_()]
    weights = [torch.randn(2, size, dtype=torch.float64) for size in (9, 7)]
    found = torch.autograd.grad(sinkhorn_potentials(*leaves, eps=eps, backend=backend), leaves, weights)
    exact = reference.scalings(*leaves, eps=eps, n_iters=3)
    wanted = torch.autograd.grad((exact.f[-1], exact.g[-1]), leaves, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [0.02, 0.1])
def test_each_element_stops_by_itself(backend, dtype, eps):
    scores = (cosines(3, 25, 20) * torch.tensor([0.01, 0.1, 0.5]).double().view(3, 1, 1)).to(dtype)
    leaves = [scores.requires_grad_(), masses(3, 25).to(dtype).requires_grad_()]
    plan, error = sinkhorn(*leaves, eps=eps, n_iters=200, tol=1e-4, return_error=True, backend=backend)
    exact = reference.scalings(leaves[0].double(), leaves[1].double(), None, eps=eps, n_iters=200, tol=1e-4)
    assert exact.count[0] < exact.count[2], "the case must have elements that stop at different iterations"
    assert error.max() <= 1e-4
    wanted = reference.plan(leaves[0].double(), exact.f[-1], exact.g[-1], eps=eps)
    limit = 1e-9 if dtype == torch.float64 else 2e-3
    assert distance(plan, wanted) < limit
    gradient = torch.randn(3, 25, 20, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = torch.autograd.grad(plan, leaves, gradient)
    for value, right in zip(found, torch.autograd.grad(wanted, leaves, gradient.double()), strict=True):
        assert distance(value, right.double()) < limit * 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-3, 0.05])
def test_a_start_continues_an_iteration(backend, dtype, eps):
    scores = cosines(2, 21, 34).to(dtype)
    a = masses(2, 21).to(dtype)
    _, g = sinkhorn_potentials(scores, a, eps=eps, n_iters=3, backend=backend)
    wanted = sinkhorn(scores.double(), a.double(), eps=eps, n_iters=5, backend="reference")
    near = sinkhorn(scores.double(), a.double(), eps=eps, n_iters=4, backend="reference")
    found = sinkhorn(scores, a, start=g, eps=eps, n_iters=2, backend=backend)
    precision = torch.finfo(compute_dtype(dtype)).eps / eps * 16 + 2 * torch.finfo(dtype).eps
    assert distance(found, wanted) <= precision
    assert distance(near, wanted) > precision, "the case must tell one iteration from the next"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [1e-3, 0.05])
@pytest.mark.parametrize("n_iters", [1, 3])
def test_gradients_from_a_start(backend, dtype, eps, n_iters):
    a, b, start = masses(2, 13), masses(2, 18, seed=3), 3 * masses(18, seed=5).log()
    a[0, 2] = b[1, 17] = 0

    def from_start(scores, a, b, eps, n_iters):
        return reference.sinkhorn(scores, a, b, start.to(scores.dtype), eps=eps, n_iters=n_iters)[0]

    check(backend, dtype, cosines(2, 13, 18), a, b, eps, n_iters, from_start, start=start)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_start_is_a_constant(backend):
    start = torch.zeros(7, requires_grad=True)
    assert not sinkhorn(cosines(6, 7).float(), start=start, backend=backend).requires_grad
    plan = sinkhorn(cosines(6, 7).float().requires_grad_(), start=start, backend=backend)
    assert torch.autograd.grad(plan.sum(), start, allow_unused=True) == (None,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_start_of_minus_infinity_leaves_columns_out_of_the_first_rows(backend):
    scores, start = cosines(2, 6, 7).float(), torch.zeros(7)
    start[2] = float("-inf")
    found = sinkhorn(scores, start=start, n_iters=2, backend=backend)
    wanted, _ = reference.sinkhorn(scores.double(), None, None, start, n_iters=2)
    assert distance(found, wanted) <= 1e-6
    assert found[..., 2].gt(0).any(), "it is set with the other columns"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_good_start_needs_one_iteration(backend):
    scores = cosines(3, 25, 20)
    _, g = sinkhorn_potentials(scores, eps=0.1, n_iters=500, backend=backend)
    plan, error = sinkhorn(scores, start=g, eps=0.1, n_iters=1, return_error=True, backend=backend)
    assert error.max() < 1e-9
    torch.testing.assert_close(plan, sinkhorn(scores, eps=0.1, n_iters=500, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    leaves = [cosines(2, 4, 5).requires_grad_(), masses(2, 4).requires_grad_(), masses(2, 5).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *t: sinkhorn(*t, eps=0.3, backend=backend), leaves)
    assert torch.autograd.gradcheck(lambda *t: sinkhorn_potentials(*t, eps=0.3, backend=backend), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: sinkhorn(*t, eps=0.3, backend=backend), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tol", "store_plan"), [(None, True), (0.01, True), (None, False)])
def test_opcheck(backend, tol, store_plan):
    leaves = [cosines(2, 4, 5).requires_grad_(), masses(2, 4).requires_grad_(), masses(2, 5).requires_grad_()]
    torch.library.opcheck(
        torch.ops.objslot.sinkhorn, (*leaves, None, 0.1, 3, tol, True, store_plan, tol is not None, backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend):
    scores = cosines(2, 9, 7).float().requires_grad_()
    a = masses(9).float().requires_grad_()

    def loss(scores, a):
        return sinkhorn(scores, a, backend=backend).square().sum()

    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(scores, a)
    grads = torch.autograd.grad(found, (scores, a))
    wanted = loss(scores, a)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, (scores, a)))


@pytest.mark.skipif("cpu" not in BACKENDS or not _native.load(), reason="needs the compiled module")
class TestMemoryOfResults:
    SCORES = torch.randn(3, 300, 290, generator=torch.Generator().manual_seed(4))

    def test_a_result_has_its_memory_for_itself(self):
        first = sinkhorn(self.SCORES, backend="cpu")
        kept = first.clone()
        row = first[1]
        others = [sinkhorn(self.SCORES + k, n_iters=1, backend="cpu") for k in range(3)]
        del first
        others.append(sinkhorn(self.SCORES * 0.5, backend="cpu"))
        assert torch.equal(row, kept[1]), "a view keeps the memory"
        assert len({other.data_ptr() for other in [row, *others]}) == 5

    def test_the_memory_is_used_again(self):
        place = sinkhorn(self.SCORES, backend="cpu").data_ptr()
        assert sinkhorn(self.SCORES, backend="cpu").data_ptr() == place

    def test_it_behaves_like_any_tensor(self):
        plan = sinkhorn(self.SCORES, backend="cpu")
        copy = plan.clone()
        assert torch.equal(pickle.loads(pickle.dumps(plan)), copy)
        plan.share_memory_()
        assert plan.is_shared()
        assert torch.equal(plan, copy)
        plan.add_(1).resize_(2, 3)
        assert torch.equal(plan, (copy + 1).flatten()[:6].view(2, 3))

    def test_threads_may_take_and_give_at_once(self):
        def work(seed):
            scores = self.SCORES + seed / 10
            wanted = reference.sinkhorn(scores, eps=1.0)[0]
            return all(torch.allclose(sinkhorn(scores, eps=1.0, backend="cpu"), wanted) for _ in range(20))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))


def test_the_backward_keeps_the_backend_of_the_forward(monkeypatch):
    from objslot.ops.sinkhorn import autograd

    used = []
    implementation = autograd._implementation
    monkeypatch.setattr(autograd, "_implementation", lambda name: used.append(name) or implementation(name))
    scores = cosines(3, 4).requires_grad_()
    with _backends.use_backend("reference"):
        plan = sinkhorn(scores)
    plan.square().sum().backward()
    assert used == ["reference", "reference"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(scores=[[1.0]]), TypeError, "scores: expected a tensor"),
        (dict(scores=torch.zeros(4)), ValueError, "scores: expected at least 2 dimensions"),
        (dict(scores=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "scores: expected float16"),
        (dict(scores=torch.zeros(0, 3)), ValueError, "scores: expected at least one row"),
        (dict(a=torch.ones(3)), ValueError, "a: expected shape"),
        (dict(a=torch.ones(2, 4)), ValueError, "a: expected shape"),
        (dict(b=torch.ones(3).double()), TypeError, "b: expected float32"),
        (dict(a=torch.tensor([1.0, -0.5])), ValueError, "a: expected no negative entry, got -0.5"),
        (dict(start=[0.0, 0.0, 0.0]), TypeError, "start: expected a tensor"),
        (dict(start=torch.ones(2)), ValueError, "start: expected shape"),
        (dict(start=torch.ones(3).double()), TypeError, "start: expected float32"),
        (dict(eps=0), ValueError, "eps: expected a finite number above 0"),
        (dict(eps=float("nan")), ValueError, "eps: expected a finite number above 0"),
        (dict(n_iters=0), ValueError, "n_iters: expected at least 1"),
        (dict(n_iters=2.5), TypeError, "n_iters: expected an integer"),
        (dict(tol=-1.0), ValueError, "tol: expected a finite number above 0"),
    ],
)
@pytest.mark.parametrize("function", [sinkhorn, sinkhorn_potentials])
def test_bad_arguments(change, error, words, function):
    arguments = {"scores": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=words):
        function(arguments.pop("scores"), arguments.pop("a", None), arguments.pop("b", None), **arguments)
