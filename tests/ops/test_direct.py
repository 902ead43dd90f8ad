"""When kernels are called without the dispatcher, and that it changes nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from objslot.ops import (
    _direct,
    _native,
    sinkhorn,
    sinkhorn_potentials,
    sinkhorn_transport,
    slot_attention,
    slot_softmax,
    use_backend,
)
from objslot.ops.transport import alignment

pytestmark = pytest.mark.skipif(_native.load() is None, reason="the compiled module is missing")


class Watch(TorchDispatchMode):
    """Notes the ops that the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    pass


def test_ordinary_tensors_need_no_dispatcher():
    assert _direct.possible(torch.zeros(2), None, torch.nn.Parameter(torch.zeros(2)))


def test_other_tensors_go_through_the_dispatcher():
    assert not _direct.possible(torch.zeros(2, device="meta"))
    assert not _direct.possible(torch.zeros(2), torch.zeros(2).as_subclass(Marked))


def test_a_named_backend_goes_through_the_dispatcher(monkeypatch):
    with use_backend("reference"):
        assert not _direct.possible(torch.zeros(2))
    monkeypatch.setenv("OBJSLOT_BACKEND", "reference")
    assert not _direct.possible(torch.zeros(2))


def test_who_watches_sees_the_op():
    scores = torch.zeros(2, 3, requires_grad=True)
    with Watch() as watch:
        torch.autograd.grad(sinkhorn(scores).sum(), scores)
    assert {"objslot.sinkhorn.default", "objslot.sinkhorn_backward.default"} <= set(watch.seen)


def test_who_watches_the_backward_alone_sees_it():
    scores = torch.zeros(2, 3, requires_grad=True)
    plan = sinkhorn(scores).sum()
    with Watch() as watch:
        torch.autograd.grad(plan, scores)
    assert "objslot.sinkhorn_backward.default" in watch.seen


def test_transforms_go_through_the_dispatcher():
    seen = []

    def total(scores):
        seen.append(_direct.possible(scores))
        return scores.sum()

    torch.func.grad(total)(torch.rand(3, 4))
    torch.func.vmap(total)(torch.rand(3, 4))
    torch.jit.trace(total, (torch.rand(3, 4),), check_trace=False)
    assert seen and not any(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("given", [False, True])
def test_both_ways_agree_to_the_bit(dtype, given):
    scores = torch.rand(2, 5, 7, dtype=dtype, requires_grad=True)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    masses = [torch.rand(2, size, dtype=arithmetic).softmax(-1).requires_grad_() for size in (5, 7)] if given else []
    leaves = [scores, *masses]
    upper = torch.rand(2, 5, 7).to(dtype)
    found = []
    for backend in (None, "cpu"):
        plan = sinkhorn(*leaves, backend=backend)
        f, g, error = sinkhorn_potentials(*leaves, return_error=True, backend=backend)
        gradients = torch.autograd.grad([plan, f, g], leaves, [upper, torch.ones_like(f), torch.ones_like(g)])
        assert not error.requires_grad
        found.append([plan, f, g, error, *gradients])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_masses_are_checked():
    with pytest.raises(ValueError, match="a: expected no negative entry"):
        sinkhorn(torch.zeros(2, 3), torch.tensor([1.5, -0.5]))


OPS = {
    "slot_attention": (slot_attention, [(2, 3, 4, 5), (2, 9, 5), (2, 9, 6), (2, 3, 9)]),
    "slot_softmax": (slot_softmax, [(2, 3, 4, 9), (2, 3, 9)]),
    "sinkhorn_transport": (sinkhorn_transport, [(2, 5, 4), (2, 6, 4), (2, 6, 3), (2, 5), (2, 6)]),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ops_agree_to_the_bit_both_ways(name, dtype):
    op, shapes = OPS[name]
    leaves = [torch.rand(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    found = []
    for backend in (None, "cpu"):
        result = op(*leaves, backend=backend)
        with torch.no_grad():
            assert torch.equal(op(*leaves, backend=backend), result)
        found.append([result, *torch.autograd.grad(result.square().sum(), leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", OPS)
def test_who_watches_sees_the_ops(name):
    op, shapes = OPS[name]
    leaves = [torch.rand(shape, requires_grad=True) for shape in shapes]
    with Watch() as watch:
        torch.autograd.grad(op(*leaves).sum(), leaves)
    assert {f"objslot.{name}.default", f"objslot.{name}_backward.default"} <= set(watch.seen)
    result = op(*leaves).sum()
    with Watch() as watch:
        torch.autograd.grad(result, leaves)
    assert watch.seen.count(f"objslot.{name}_backward.default") == 1


@pytest.mark.parametrize("name", OPS)
def test_second_order_of_ops_without_the_dispatcher(name):
    op, shapes = OPS[name]
    leaves = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize("name", OPS)
def test_the_backward_stays_where_the_forward_was(name):
    op, shapes = OPS[name]
    leaves = [torch.rand(shape, requires_grad=True) for shape in shapes]
    expected = torch.autograd.grad(op(*leaves).square().sum(), leaves)
    result = op(*leaves).square().sum()
    with use_backend("reference"):
        found = torch.autograd.grad(result, leaves)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_who_watches_the_backward_of_potentials_alone_sees_it():
    scores = torch.rand(2, 5, 7, requires_grad=True)
    f, g = sinkhorn_potentials(scores)
    expected = torch.autograd.grad(f.square().sum() + g.square().sum(), scores, retain_graph=True)[0]
    with Watch() as watch:
        found = torch.autograd.grad(f.square().sum() + g.square().sum(), scores)[0]
    assert "objslot.sinkhorn_backward.default" in watch.seen
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_alignment_agrees_to_the_bit_both_ways(dtype):
    tokens, values = torch.rand(2, 3, 5, 4, dtype=dtype), torch.rand(2, 3, 5, 6, dtype=dtype)
    masses = torch.rand(2, 3, 5, dtype=dtype)
    with Watch() as watch:
        expected = alignment(tokens, values, masses)
    assert "objslot.alignment.default" in watch.seen
    assert torch.equal(alignment(tokens, values, masses), expected)
    with pytest.raises(ValueError, match="masses: expected no negative entry"):
        alignment(tokens, values, -masses)


def test_errors_of_transport_agree_both_ways():
    x, y, values = (torch.rand(2, size, 4, requires_grad=True) for size in (5, 6, 6))
    for one, other in zip(
        sinkhorn_transport(x, y, values, return_error=True),
        sinkhorn_transport(x, y, values, return_error=True, backend="cpu"),
        strict=True,
    ):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad
