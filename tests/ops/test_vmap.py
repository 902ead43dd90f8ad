"""`torch.vmap` over the ops: one call for all, to the results of one call each."""

import warnings

import pytest
import torch
from adversarial_cases import BACKENDS, EVERY, assert_alike, case

from objslot import ops

# Where what is mapped over lies, for one argument after the other; None: the same for all.
PLACES = [(0, 0, 0, 0, 0), (-1, 0, -1, 0, -1), (0, None, 0, None, None), (None, 0, None, 0, 0)]
SECOND_RESULTS = {
    "slot_attention": {"return_logits": True},
    **dict.fromkeys(("sinkhorn", "sinkhorn_potentials", "sinkhorn_transport"), {"return_error": True}),
}
CALLS = [
    (op, backend, options)
    for op, backend in BACKENDS
    for options in ([{}, SECOND_RESULTS[op]] if op in SECOND_RESULTS else [{}])
]


@pytest.fixture(autouse=True)
def no_loop_of_pytorch():
    """PyTorch warns where it has no rule for an op and calls it for one element after the other."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def function(plain, backend):
    """The op on those of its tensors that are given, one after the other."""
    places = [place for place, x in enumerate(plain.inputs) if x is not None]

    def call(*given):
        inputs = [None] * len(plain.inputs)
        for place, x in zip(places, given, strict=True):
            inputs[place] = x
        words = {"bias": inputs.pop(4)} if plain.op == "slot_attention" else {}
        results = getattr(ops, plain.op)(*inputs, **words, **plain.options, backend=backend)
        return results if isinstance(results, tuple) else (results,)

    return call, [plain.inputs[place] for place in places]


def arranged(inputs, places):
    """The inputs with the dimension that is mapped over at its place, and the places of all."""
    places = places[: len(inputs)]
    return [x[0] if at is None else x.movedim(0, at) for x, at in zip(inputs, places, strict=True)], places


def one_by_one(call, inputs, places, size):
    """Stacked results of single calls."""
    results = [
        call(*(x if at is None else x.select(at, index) for x, at in zip(inputs, places, strict=True)))
        for index in range(size)
    ]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize(("op", "backend", "options"), CALLS)
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_the_same_as_one_call_each(op, backend, options, places):
    if op == "assign":
        places = (places[0] or 0,)
    call, inputs = function(case(op, batch=(4, 3), **options), backend)
    inputs, places = arranged(inputs, places)
    leaves = [x.clone().requires_grad_(op != "assign") for x in inputs]
    found = torch.vmap(call, in_dims=places)(*leaves)
    single = one_by_one(call, leaves, places, 4)
    assert_alike(op, backend, found, single)
    if op == "assign":
        return
    upper = [torch.randn_like(x) if x.requires_grad else None for x in found]
    pairs = [(mine, theirs, u) for mine, theirs, u in zip(found, single, upper, strict=True) if u is not None]
    mine, theirs = (
        torch.autograd.grad([pair[k] for pair in pairs], leaves, [pair[2] for pair in pairs]) for k in range(2)
    )
    # What all share is summed up in another order.
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6 * y.abs().max().item())


@EVERY
def test_maps_in_maps(op, backend):
    plain = case(op, batch=(2, 3))
    call, inputs = function(plain, backend)
    inputs = [x.movedim(1, -1) for x in inputs]
    found = torch.vmap(torch.vmap(call, in_dims=-1), in_dims=0)(*inputs)
    assert_alike(op, backend, found, plain.run(gradient=False, backend=backend))
