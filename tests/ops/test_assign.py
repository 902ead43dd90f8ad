"""assign against scipy, and ties against a search through all assignments."""

from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from objslot.ops import _backends, assign

CPU = [name for name in ("reference", "cpu") if name in _backends.registered()["assign"]]
SIZES = [(1, 1), (2, 3), (4, 4), (3, 5), (5, 5), (1, 6), (4, 7), (6, 6), (7, 7), (20, 20), (9, 30)]


def scores(count, rows, columns, *, whole, seed=0):
    generator = torch.Generator().manual_seed(seed + rows * 31 + columns)
    if whole:
        return torch.randint(0, whole, (count, rows, columns), generator=generator).double()
    return torch.randn(count, rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("whole", [0, 2, 5])
def test_total_equals_scipy(backend, size, whole):
    problems = scores(12, *size, whole=whole)
    index = assign(problems, backend=backend)
    assert index.dtype == torch.int64
    for problem, row in zip(problems, index, strict=True):
        taken = row.tolist()
        assert len(set(taken)) == size[0]
        wanted = problem.numpy()[linear_sum_assignment(problem.numpy(), maximize=True)].sum()
        assert problem[torch.arange(size[0]), row].sum().item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("size", [(2, 3), (4, 4), (3, 5), (5, 5), (2, 6), (4, 7), (6, 6)])
@pytest.mark.parametrize("whole", [1, 2, 3])
def test_ties_give_the_smallest_row(backend, size, whole):
    problems = scores(6, *size, whole=whole, seed=5)
    index = assign(problems, backend=backend)
    for problem, row in zip(problems.tolist(), index.tolist(), strict=True):
        best = max(
            permutations(range(size[1]), size[0]),
            key=lambda choice: (sum(problem[i][j] for i, j in enumerate(choice)), [-j for j in choice]),
        )
        assert tuple(row) == best


@pytest.mark.skipif("cpu" not in CPU, reason="no cpu kernels")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_backends_agree(size, dtype):
    for whole in (0, 2, 4):
        problems = scores(40, *size, whole=whole, seed=3).to(dtype)
        assert torch.equal(assign(problems, backend="cpu"), assign(problems, backend="reference"))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("size", [(3, 3), (6, 6), (6, 8)])
def test_undefined_and_forbidden(backend, size):
    problems = scores(5, *size, whole=0)
    clean = assign(problems, backend=backend)
    problems[1, 0, 1] = torch.nan
    problems[2] = -torch.inf
    problems[3, 1, 2] = torch.inf
    problems[4, 0, :2] = -torch.inf
    index = assign(problems, backend=backend)
    identity = torch.arange(size[0])
    assert torch.equal(index[0], clean[0])
    assert all(torch.equal(index[place], identity) for place in (1, 2, 3))
    assert index[4, 0] >= 2


@pytest.mark.parametrize("backend", CPU)
def test_batches_strides_and_registration(backend):
    problems = scores(24, 4, 4, whole=0)
    flat = assign(problems, backend=backend)
    assert torch.equal(assign(problems.reshape(2, 3, 4, 4, 4), backend=backend).reshape(24, 4), flat)
    transposed = problems.mT.contiguous().mT
    assert torch.equal(assign(transposed, backend=backend), flat)
    assert assign(problems[:0], backend=backend).shape == (0, 4)
    assert assign(scores(0, 6, 7, whole=0), backend=backend).shape == (0, 6)
    leaf = problems.clone().requires_grad_()
    assert not assign(leaf, backend=backend).requires_grad
    torch.library.opcheck(torch.ops.objslot.assign, (problems, backend))
    assert torch.equal(torch.compile(assign, fullgraph=True)(problems, backend=backend), flat)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([[1.0]], TypeError, "scores: expected a tensor"),
        (torch.zeros(3), ValueError, "scores: expected at least 2 dimensions"),
        (torch.zeros(3, 2), ValueError, "1 <= p <= q"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "scores: expected float16"),
    ],
)
def test_bad_arguments(value, error, message):
    with pytest.raises(error, match=message):
        assign(value)
