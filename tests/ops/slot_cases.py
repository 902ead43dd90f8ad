"""Inputs, error budgets and the oracle for the tests of slot attention and its softmax."""

import torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_mask(*shape, seed=9, holes=True):
    """Weights of positions (batch, groups, n): soft, and where asked with zeros in some and in all groups."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.05
    if holes:
        mask = mask * (torch.rand(*shape, generator=generator) > 0.4)
        mask[..., shape[-1] // 3 : 2 * shape[-1] // 3] = 0
        mask[0, 0] = 0
    return mask


def evaluate(function, inputs):
    """Results of `function(*inputs)` and the gradients of all inputs for fixed upper gradients."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    upper = [noise(*result.shape, seed=77 + place).to(result.dtype) for place, result in enumerate(results)]
    wanted = [x for x in leaves if x is not None]
    return [*(result.detach() for result in results), *torch.autograd.grad(results, wanted, upper)]


def distance(found, wanted):
    """Root mean square difference relative to the root mean square of `wanted`."""
    if not wanted.numel():
        return 0.0
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def check_budget(op, plain, inputs, dtype):
    """Results and gradients of `op` in `dtype` err at most twice as much as `plain` does in that dtype.

    The oracle is `plain` in float64 on the rounded inputs, so float64 itself is only held to rounding. A few
    roundings are allowed where `plain` happens to make none.
    """
    rounded = [None if x is None else x.to(dtype) for x in inputs]
    oracle = evaluate(plain, [None if x is None else x.double() for x in rounded])
    found, own = evaluate(op, rounded), evaluate(plain, rounded)
    assert all(x.dtype == dtype for x in found)
    for place, (mine, theirs, wanted) in enumerate(zip(found, own, oracle, strict=True)):
        least = 1e-12 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
        error, budget = distance(mine, wanted), max(2 * distance(theirs, wanted), least)
        assert error <= budget, f"result {place}: error {error:.2g}, budget {budget:.2g}"
