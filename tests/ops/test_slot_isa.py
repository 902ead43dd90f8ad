"""The kernels on slots at every level of instructions that this machine has."""

import os
import subprocess
import sys

import pytest

from objslot.ops import _native

SCRIPT = """
import torch
from objslot.ops import _native, propagate, slot_attention, slot_softmax
from objslot.ops.slot_loop import Epsilons, Layers, autograd, slot_loop
assert _native.load().isa() == {level!r}
torch.manual_seed(0)
for dtype, budget in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
    for groups, slots, positions, width in ((1, 16, 130, 48), (3, 5, 70, 19), (2, 1, 9, 3), (1, 40, 65, 8)):
        arguments = [torch.randn(2, groups, slots, width), torch.randn(2, positions, width),
                     torch.randn(2, positions, width), torch.rand(2, groups, positions) + 0.1]
        arguments = [x.to(dtype) for x in arguments]
        logits = torch.randn(2, groups, slots, positions).to(dtype)
        found = {{}}
        for backend in ("cpu", "reference"):
            leaves = [x.clone().requires_grad_() for x in arguments]
            updates, scores = slot_attention(*leaves, eps=1e-3, return_logits=True, backend=backend)
            upper = (updates.double().cos().to(dtype).detach(), scores.double().cos().to(dtype).detach())
            grads = torch.autograd.grad((updates, scores), leaves, upper)
            leaf, mask = logits.clone().requires_grad_(), arguments[3]
            weights = slot_softmax(leaf, mask, backend=backend)
            found[backend] = [updates, scores, *grads, weights, *torch.autograd.grad(weights, leaf, logits.cos())]
            query, keys = torch.ones(2, 9, 9, width), torch.ones(2, 2, 9, 9, width)
            generator = torch.Generator().manual_seed(1)
            query, keys = (torch.randn(x.shape, generator=generator).to(dtype) for x in (query, keys))
            found[backend].append(propagate(query, keys, keys[..., :2], radius=20, topk=400, temperature=0.2,
                                            backend=backend))
        for place, (mine, theirs) in enumerate(zip(found["cpu"], found["reference"])):
            error = (mine.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-3)
            assert error < budget, (dtype, groups, slots, place, float(error))
for dtype, budget in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
    for groups, slots, positions, width, inputs, hidden in ((1, 7, 70, 64, 48, 100), (3, 5, 9, 19, 33, 7)):
        layers = [torch.randn(size, dtype=dtype) / size[-1] ** 0.5
                  for size in autograd.layer_sizes(width, inputs, hidden)]
        given = [torch.randn(5, positions, inputs), torch.rand(5, groups, positions) + 0.1,
                 torch.randn(5, groups, slots, width)]
        given = [x.to(dtype) for x in given] + layers
        found = {{}}
        for backend in ("cpu", "reference"):
            leaves = [x.clone().requires_grad_() for x in given]
            x, mask, initial = leaves[:3]
            results = slot_loop(x, initial, mask, Layers(*leaves[3:]), scale=0.3, iterations=2, backend=backend,
                                eps=Epsilons(1e-3, 1e-5, 1e-5, 1e-5))[:2]
            upper = [result.double().cos().to(dtype).detach() for result in results]
            found[backend] = [*results, *torch.autograd.grad(results, leaves, upper)]
        for place, (mine, theirs) in enumerate(zip(found["cpu"], found["reference"])):
            error = (mine.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-3)
            assert error < budget, ("slot_loop", dtype, groups, slots, place, float(error))
print("equal")
"""

LEVELS = ("base", "avx2", "avx512")


@pytest.mark.skipif(_native.why_missing() is not None, reason="no compiled module")
@pytest.mark.parametrize("level", LEVELS)
def test_level(level):
    if LEVELS.index(level) > LEVELS.index(_native.load().best_isa()):
        pytest.skip(f"this machine has no {level}")
    environment = {**os.environ, "OBJSLOT_ISA": level}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(level=level)], env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == "equal", result.stderr
