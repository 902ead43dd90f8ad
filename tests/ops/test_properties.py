"""Ops on drawn shapes, layouts, dtypes, values, masks and options, each against float64."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from op_cases import DTYPES, LAYOUTS, OPS, VALUES, check_error, make

from objslot import ops
from objslot.ops import _backends
from objslot.ops.slot_attention import autograd as slot_attention

ROWS = {"sinkhorn_potentials": "sinkhorn"}
BACKENDS = [
    (op, backend)
    for op in OPS
    for backend in _backends.registered()[ROWS.get(op, op)]
    if backend in ("cpu", "reference")
]

SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 40, 63, 65, 70])
WIDTHS = st.sampled_from([1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 33])


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    """What an op forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@st.composite
def cases(draw, op, dtype, sizes=SIZES, widths=WIDTHS):
    batch = draw(st.sampled_from([(), (1,), (2,), (3,), (2, 1), (2, 3), (0,), (2, 0)]))
    sizes = [draw(sizes), draw(sizes), draw(widths), draw(widths), draw(st.integers(1, 4))]
    values = draw(st.sampled_from(VALUES))
    layouts = draw(st.lists(st.sampled_from(LAYOUTS), min_size=5, max_size=5))
    masses = draw(st.tuples(*[st.sampled_from(["none", "normal", "zeros"])] * 2))
    options = {}
    if op.startswith("sinkhorn"):
        options = {
            "eps": draw(st.sampled_from([1e-3, 0.05, 0.3, 10.0])),
            "n_iters": draw(st.sampled_from([1, 2, 3, 8])),
        }
    if op == "sinkhorn_transport":
        options["similarity"] = draw(st.sampled_from(["cosine", "dot"]))
    if op.startswith("slot"):
        options = {"eps": draw(st.sampled_from([1e-8, 1e-3]))}
    if op == "slot_attention":
        options |= {"return_logits": draw(st.booleans()), "scale": draw(st.sampled_from([None, 0.01, 1.0]))}
    if op == "propagate":
        options = {"radius": draw(st.integers(1, 9)), "topk": draw(st.integers(1, 12)), "temperature": 0.2}
        options["n_global"] = draw(st.integers(0, 2))
    return make(op, batch, sizes, values, masses, layouts, dtype, draw(st.integers(0, 10**6)), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), [pair for pair in BACKENDS if pair[0] != "assign" and pair[1] == "cpu"])
@given(data=st.data())
def test_as_near_to_float64_as_plain_pytorch(op, backend, dtype, data):
    case = data.draw(cases(op, dtype))
    if op == "propagate":
        assume(clear_choice(case))
    check_error(case, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_as_near_with_a_softmax_that_is_kept(dtype, data):
    """Without the dispatcher slot attention may keep its softmax for the backward pass; here it always does."""
    case = data.draw(cases("slot_attention", dtype))
    with mock.patch.object(slot_attention.native, "_KEPT", 0):
        check_error(case, dtype, None)


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_layout_changes_nothing(op, data):
    """The reference on any layout gives what it gives on plain memory: it is the judge of all others."""
    case = data.draw(cases(op, torch.float64))
    plain = [None if x is None else x.contiguous().clone() for x in case.inputs]
    for found, wanted in zip(case.run(), case.run(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(("op", "backend"), [pair for pair in BACKENDS if pair[0] == "assign"])
@given(data=st.data())
def test_assignments_are_the_first_of_the_best(op, backend, data):
    case = data.draw(cases(op, data.draw(st.sampled_from(DTYPES))))
    (scores,) = case.inputs
    index = ops.assign(scores, backend=backend)
    assert index.shape == scores.shape[:-1] and index.dtype == torch.int64
    rows, columns = scores.shape[-2:]
    for problem, found in zip(scores.reshape(-1, rows, columns).double(), index.reshape(-1, rows), strict=True):
        assert sorted(set(found.tolist())) == sorted(found.tolist()) and 0 <= found.min() and found.max() < columns
        if columns <= 5:
            best = max(itertools.permutations(range(columns), rows), key=lambda places: value(problem, places))
            assert tuple(found.tolist()) == best
        else:
            from scipy.optimize import linear_sum_assignment

            places = linear_sum_assignment(problem.numpy(), maximize=True)[1]
            assert value(problem, found.tolist()) == pytest.approx(value(problem, places), rel=1e-12, abs=1e-12)


def value(problem, places) -> float:
    return sum(problem[row, column].item() for row, column in enumerate(places))


def clear_choice(case) -> bool:
    """Whether the last chosen cosine of every position is well apart from the first that is left out."""
    query, keys = (torch.nn.functional.normalize(x.double(), dim=-1) for x in case.inputs[:2])
    height, width, _ = query.shape[-3:]
    frames = keys.shape[-4]
    cosines = query.flatten(-3, -2) @ keys.flatten(-4, -2).mT
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).reshape(-1, 2)
    near = torch.cdist(grid.double(), grid.double()) < case.options["radius"]
    allowed = torch.stack([near | (frame < case.options["n_global"]) for frame in range(frames)], 1).flatten(1)
    ranked = cosines.masked_fill(~allowed, -9).sort(-1, descending=True).values
    topk = case.options["topk"]
    if topk >= ranked.shape[-1]:
        return True
    gap = (ranked[..., topk - 1] - ranked[..., topk])[(ranked[..., topk] > -5)]
    return not gap.numel() or gap.min().item() > 1e-4
