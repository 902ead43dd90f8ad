"""The CUDA kernels of Sinkhorn, their sources compiled for the CPU, against the reference in float64.

Every thread of a block or a cluster runs, as a fiber, through the very code and the very launches of csrc/cuda, called
by the op's own Python. The device is made up: sm_90 with clusters, sm_80 without, and shared memory of any size.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import building

pytest.importorskip("pybind11")
if building.COMPILER is None:
    pytest.skip("needs g++", allow_module_level=True)

from objslot.ops import _cuda
from objslot.ops.sinkhorn import cuda, reference

HOPPER, AMPERE = 232448, 166912
# Capability of the device, architecture that the kernels are compiled for, and bytes of shared memory of a block.
DEVICES = {"sm_90": (9, 900, HOPPER), "sm_80": (8, 800, AMPERE), "sm_80 on 9.0": (9, 800, HOPPER)}


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    def load(architecture):
        path = building.module(tmp_path_factory.mktemp(f"sm{architecture}"), architecture)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, ctypes.CDLL(str(path))

    return {architecture: load(architecture) for architecture in (900, 800)}


@pytest.fixture
def use(modules, monkeypatch):
    """use(device, order, shared) sends calls of the op there; what it returns tells the largest cluster since."""

    def choose(device="sm_90", order=0, shared=None):
        major, architecture, most = DEVICES[device]
        module, library = modules[architecture]
        monkeypatch.setattr(_cuda, "load", lambda: (module, None))
        monkeypatch.setattr(cuda, "_stream", lambda tensor: 0)
        library.emulate(major, shared or most, order)
        return library.emulated_cluster

    return choose


def problem(dtype, n, m, batch=2, scale=1.0, holes=False):
    scores = (torch.rand(batch, n, m, dtype=torch.float64) * 2 - 1).mul(scale).to(dtype)
    a, b = torch.rand(batch, n).double() + 0.1, torch.rand(batch, m).double() + 0.1
    if holes:
        a[0, 1], b[0, 2], b[-1, 0] = 0, 0, 0
    return scores, (a / a.sum(-1, keepdim=True)).float(), (b / b.sum(-1, keepdim=True)).float()


def by_autograd(scores, a, b, gradient, eps, n_iters):
    """Plan and gradients of plain PyTorch in the dtype of the arithmetic of `gradient`."""
    leaves = [x.detach().clone().requires_grad_() for x in (scores, a, b)]
    plan = reference.sinkhorn(*leaves, eps=eps, n_iters=n_iters)[0]
    return plan.detach(), *torch.autograd.grad(plan, leaves, gradient.to(plan.dtype))


def by_kernels(scores, a, b, gradient, eps, n_iters):
    found = cuda.forward(scores, a, b, None, eps, n_iters, None, True, True, False)
    assert found["count"].tolist() == [n_iters] * len(scores)
    history = [found[name] for name in ("history_f", "history_g", "count")]
    return found["plan"], *cuda.backward(
        gradient, None, None, scores, a, b, None, found["plan"], *history, eps, n_iters, None
    )


def close(found, wanted, own, rounding, terms):
    """At most twice the error of plain PyTorch, or the rounding of the exponents where that happens to be exact.

    `terms`: the sizes of what cancels in the result.
    """
    assert found.shape == wanted.shape
    size = torch.maximum(wanted.norm(), terms.norm()).clamp_min(1e-30)
    error, plain = ((value.double() - wanted).norm() / size for value in (found, own))
    assert error <= max(2 * plain, rounding), (error, plain, rounding)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "n", "m", "eps", "scale", "n_iters", "holes"),
    [
        (torch.float32, 1, 1, 0.05, 1.0, 2, False),
        (torch.float32, 7, 3, 0.05, 1.0, 3, True),
        (torch.float16, 33, 65, 0.05, 1.0, 3, True),
        (torch.bfloat16, 64, 31, 0.1, 1.0, 2, False),
        (torch.bfloat16, 196, 255, 0.05, 1.0, 1, True),
        (torch.float32, 256, 256, 0.05, 1.0, 3, False),
        (torch.float32, 251, 200, 10.0, 1.0, 1, True),
        (torch.float32, 17, 40, 1e-3, 1.0, 4, True),
        (torch.float32, 20, 9, 0.05, 1e4, 3, False),
        (torch.float32, 12, 20, 0.05, 1.0, 40, False),
    ],
)
def test_plan_and_gradients(use, device, dtype, n, m, eps, scale, n_iters, holes):
    largest = use(device)
    scores, a, b = problem(dtype, n, m, scale=scale, holes=holes)
    gradient = torch.randn(2, n, m).to(dtype)
    wanted = by_autograd(scores.double(), a.double(), b.double(), gradient.double(), eps, n_iters)
    own = by_autograd(scores, a, b, gradient, eps, n_iters)
    found = by_kernels(scores, a, b, gradient, eps, n_iters)
    moved = wanted[0] * gradient.double().abs()
    terms = (
        wanted[0], moved / eps, moved.sum(-1) / a.double().clamp_min(1e-9), moved.sum(-2) / b.double().clamp_min(1e-9)
    )
    exponent = scores.abs().max().item() / eps + 8
    rounding = torch.finfo(dtype).eps + 2 * exponent * torch.finfo(torch.float32).eps
    for value, exact, mine, size in zip(found, wanted, own, terms, strict=True):
        close(value, exact, mine, rounding, size)
    needs_two = n * m * dtype.itemsize > 150_000
    assert largest() == (2 if needs_two and device == "sm_90" else 1)


@pytest.mark.parametrize("device", ["sm_90", "sm_80"])
def test_rows_that_do_not_fit_are_read_again(use, device):
    """Little shared memory makes a cluster of small matrices, and beyond two blocks the rest is read from outside."""
    scores, a, b = problem(torch.float32, 61, 70)
    gradient = torch.randn(2, 61, 70)
    use(device)
    wanted = by_kernels(scores, a, b, gradient, 0.05, 3)
    for rows in (40, 10):
        largest = use(device, shared=building.board_bytes() + rows * 70 * 4)
        found = by_kernels(scores, a, b, gradient, 0.05, 3)
        assert largest() == (2 if device == "sm_90" else 1)
        for value, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6 * right.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_warps_changes_nothing(use, dtype):
    side = 230 if dtype == torch.float32 else 45
    scores, a, b = problem(dtype, side, 39 if side < 100 else 256, batch=1)
    gradient = torch.randn_like(scores)
    use()
    wanted = by_kernels(scores, a, b, gradient, 0.05, 2)
    for order in (1, 2, 3):
        use(order=order)
        for value, right in zip(by_kernels(scores, a, b, gradient, 0.05, 2), wanted, strict=True):
            assert torch.equal(value, right)


@pytest.mark.parametrize("device", ["sm_90", "sm_80"])
@pytest.mark.parametrize("side", [40, 220])
def test_an_element_stops_at_the_tolerance(use, device, side):
    use(device)
    scores, a, b = problem(torch.float32, side, side)
    scores[1] *= 0.1
    right = reference.scalings(scores.double(), a.double(), b.double(), eps=0.2, n_iters=30, tol=1e-3)
    found = cuda.forward(scores, a, b, None, 0.2, 30, 1e-3, True, True, True)
    assert found["count"].tolist() == right.count.tolist()
    assert len(set(right.count.tolist())) == 2 and max(right.count) < 30
    torch.testing.assert_close(found["error"].double(), right.error, rtol=1e-3, atol=1e-6)
    plan = reference.plan(scores.double(), right.f[-1], right.g[-1], eps=0.2)
    torch.testing.assert_close(found["plan"].double(), plan, rtol=1e-4, atol=1e-9)
    history = [found[name] for name in ("history_f", "history_g", "count")]
    gradient = torch.randn_like(scores)
    mine = cuda.backward(gradient, None, None, scores, a, b, None, found["plan"], *history, 0.2, 30, 1e-3)
    leaves = [x.double().requires_grad_() for x in (scores, a, b)]
    plan = reference.sinkhorn(*leaves, eps=0.2, n_iters=30, tol=1e-3)[0]
    for value, exact in zip(mine, torch.autograd.grad(plan, leaves, gradient.double()), strict=True):
        assert (value - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("masses", [False, True])
@pytest.mark.parametrize("n_iters", [2, 25])
def test_potentials_and_their_gradients(use, masses, n_iters):
    use()
    scores, a, b = problem(torch.float32, 33, 18, holes=True)
    inputs = [scores, a if masses else None, b if masses else None]
    grads = torch.randn(2, 33), torch.randn(2, 18)

    def plain(dtype):
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
        found = reference.scalings(*leaves, eps=0.1, n_iters=n_iters)
        outputs, held = (found.f[-1], found.g[-1]), [x for x in leaves if x is not None]
        return *(x.detach() for x in outputs), *torch.autograd.grad(outputs, held, [g.to(dtype) for g in grads])

    found = cuda.forward(*inputs, None, 0.1, n_iters, None, True, False, False)
    history = [found[name] for name in ("history_f", "history_g", "count")]
    mine = cuda.backward(None, *grads, *inputs, None, None, *history, 0.1, n_iters, None)
    mine = found["f"], found["g"], *(x for x in mine if x is not None)
    for value, exact, own in zip(mine, plain(torch.float64), plain(torch.float32), strict=True):
        finite = exact.isfinite()
        assert torch.equal(value.isfinite(), finite) and torch.equal(value[~finite].double(), exact[~finite])
        close(value[finite], exact[finite], own[finite], 4e-6, exact[finite])


def test_nan_stays_in_its_element_and_strides_do_not_matter(use):
    use()
    wide = torch.randn(3, 18, 66)
    scores, a, b = wide.mT[:, ::2], torch.full((1, 33), 1 / 33).expand(3, 33), None
    clean = cuda.forward(scores, a, b, None, 0.3, 2, None, True, True, False)["plan"]
    dense = cuda.forward(scores.contiguous(), a.contiguous(), b, None, 0.3, 2, None, True, True, False)
    assert torch.equal(clean, dense["plan"])
    gradient = torch.randn(3, 18, 33).mT
    history = [dense[name] for name in ("history_f", "history_g", "count")]
    settings = (None, dense["plan"], *history, 0.3, 2, None)
    mine = cuda.backward(gradient, None, None, scores, a, b, *settings)
    right = cuda.backward(gradient.contiguous(), None, None, scores.contiguous(), a.contiguous(), b, *settings)
    assert torch.equal(mine[0], right[0]) and torch.equal(mine[1], right[1])
    broken = scores.clone()
    broken[1, 3, 4] = torch.nan
    plan = cuda.forward(broken, a, b, None, 0.3, 2, None, True, True, False)["plan"]
    assert torch.equal(plan[[0, 2]], clean[[0, 2]]) and plan[1].isnan().all()


def test_columns_without_a_sum_are_made_from_the_scores(use):
    """Terms so small that float32 has none of them: the way around must be taken, and be exact."""
    use()
    scores = torch.zeros(1, 40, 40)
    scores[0, :, 0] = -130 * 0.05 * 0.6931
    scores[0, 3, 0] += 1.0
    wanted = reference.sinkhorn(scores.double(), None, None, eps=0.05, n_iters=2)[0]
    found = cuda.forward(scores, None, None, None, 0.05, 2, None, False, True, False)["plan"]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-9)


def test_an_empty_batch_launches_nothing(use):
    largest = use()
    scores = torch.zeros(0, 4, 5)
    assert cuda.forward(scores, None, None, None, 0.05, 2, None, False, True, True)["plan"].shape == (0, 4, 5)
    assert largest() == 0


def test_a_launch_that_the_device_refuses_raises(use):
    use(shared=1024)
    with pytest.raises(RuntimeError, match="CUDA: .*shared memory|CUDA: invalid"):
        cuda.forward(torch.zeros(1, 4, 5), None, None, None, 0.05, 2, None, False, True, False)
