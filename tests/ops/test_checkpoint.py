"""Ops under gradient checkpointing, and with what they keep for the backward pass moved elsewhere meanwhile."""

from functools import partial

import pytest
import torch
from op_cases import OPS, make
from torch.utils.checkpoint import checkpoint

from objslot import nn, ops


def wide(name):
    """Sizes at which slot attention keeps its softmax."""
    options = {"radius": 3, "topk": 5, "temperature": 0.2} if name == "propagate" else {}
    sizes, masses = (3, 17, 96, 96, 2), ("normal", "normal")
    inputs = make(name, (2,), sizes, "normal", masses, ["contiguous"] * 5, torch.float32, seed=0).inputs
    return partial(getattr(ops, name), **options), [x for x in inputs if x is not None]


def gradients(function, inputs, around=lambda call: call()):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    results = around(lambda: function(*leaves))
    results = results if isinstance(results, tuple) else (results,)
    return torch.autograd.grad(sum(x.square().sum() for x in results), [x for x in leaves if x is not None])


def moved(call):
    with torch.autograd.graph.save_on_cpu():
        return call()


AROUND = {"checkpoint": lambda call: checkpoint(call, use_reentrant=False), "moved": moved}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", [name for name in OPS if name != "assign"])
def test_ops(name, around):
    function, inputs = wide(name)
    for found, wanted in zip(gradients(function, inputs, AROUND[around]), gradients(function, inputs), strict=True):
        assert torch.equal(found, wanted) and wanted.any()


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("gradient", ["full", "last"])
def test_the_module(around, gradient):
    torch.manual_seed(0)
    module = nn.SlotAttention(3, 32, iterations=2, initial="learned", gradient=gradient)
    tokens, slots = [torch.randn(2, 20, 32)], lambda x: module(x)[0]
    for found, wanted in zip(gradients(slots, tokens, AROUND[around]), gradients(slots, tokens), strict=True):
        assert torch.equal(found, wanted) and wanted.any()
