"""Every op on tensors of any shape, layout, dtype and values; and how far a result may be from float64."""

import math
from dataclasses import dataclass, field

import torch
from error_terms import terms
from torch import Tensor

from objslot import ops
from objslot.ops._arithmetic import compute_dtype

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "transposed", "stepped", "offset", "expanded", "batch last")
VALUES = ("normal", "small", "large", "ties", "denormal", "constant", "zeros")
OPS = ("sinkhorn", "sinkhorn_potentials", "sinkhorn_transport", "slot_softmax", "slot_attention", "propagate", "assign")


@dataclass
class Case:
    """A call: the op's name, its tensors (None where one is left out) and its options."""

    op: str
    inputs: list
    options: dict = field(default_factory=dict)

    def run(self, inputs=None, *, gradient=True, backend="reference", upper=None) -> list[Tensor]:
        """Results and, in the order of the tensors, their gradients for fixed upper gradients."""
        given = self.inputs if inputs is None else inputs
        gradient = gradient and self.op != "assign"
        leaves = [x if x is None else x.detach().requires_grad_(gradient) for x in given]
        words = {name: leaves[place] for place, name in KEYWORDS.get(self.op, {}).items()}
        positional = [x for place, x in enumerate(leaves) if place not in KEYWORDS.get(self.op, {})]
        results = getattr(ops, self.op)(*positional, **words, **self.options, backend=backend)
        results = list(results) if isinstance(results, tuple) else [results]
        if not gradient:
            return results
        upper = upper or uppers(results)
        wanted = [x for x in leaves if x is not None]
        found = torch.autograd.grad(results, wanted, [u.to(r.dtype) for u, r in zip(upper, results, strict=True)])
        return [*(result.detach() for result in results), *found]


KEYWORDS = {"slot_attention": {4: "bias"}}


def uppers(results) -> list[Tensor]:
    return [noise(77 + place, *result.shape) for place, result in enumerate(results)]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(values: str, seed: int, *shape: int) -> Tensor:
    x = noise(seed, *shape)
    return {
        "normal": lambda: x,
        "small": lambda: x * 1e-3,
        "large": lambda: x * 100,
        "ties": lambda: x.round(),
        "denormal": lambda: x * 1e-40,
        "constant": lambda: torch.full_like(x, 0.7),
        "zeros": lambda: x * (noise(seed + 1, *shape) > 0.5),
    }[values]()


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory; what lies between them is NaN. "expanded" repeats the first element."""
    if layout == "transposed" and x.dim() > 1:
        return x.mT.contiguous().mT
    if layout == "batch last" and x.dim() > 2:
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "stepped":
        held = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, dtype=x.dtype)
        held[..., 1::2] = x
        return held[..., 1::2]
    if layout == "offset":
        held = torch.full((x.numel() + 3,), math.nan, dtype=x.dtype)
        held[1 : 1 + x.numel()] = x.flatten()
        return held[1 : 1 + x.numel()].view(x.shape)
    if layout == "expanded" and x.dim() > 2 and x.shape[0] > 1:
        return x[:1].clone().expand(x.shape)
    return x.contiguous()


def mass(values: str, seed: int, *shape: int) -> Tensor:
    """Marginals or masks: positive, some of them zero where ``values`` is "zeros"."""
    x = noise(seed, *shape).abs() + 0.05
    if values == "zeros":
        x = x * (noise(seed + 1, *shape) > -0.3)
    return x / x.sum(-1, keepdim=True).clamp_min(1e-3)


def make(op, batch, sizes, values, masses, layouts, dtype, seed, **options) -> Case:
    """A case of ``op``. ``sizes``: five numbers of at least 1; ``layouts``: five; ``masses``: of either marginal."""
    n, m, d, c, g = sizes
    low = compute_dtype(dtype)

    def tensor(place, *shape):
        return lay_out(fill(values, seed + 10 * place, *batch, *shape).to(dtype), layouts[place])

    def weights(place, kind, size, dtype, *groups):
        return (
            None
            if kind == "none"
            else lay_out(mass(kind, seed + 10 * place, *batch, *groups, size).to(dtype), layouts[place])
        )

    if op in ("sinkhorn", "sinkhorn_potentials"):
        inputs = [tensor(0, n, m), weights(1, masses[0], n, low), weights(2, masses[1], m, low)]
    elif op == "sinkhorn_transport":
        inputs = [tensor(0, n, d), tensor(1, m, d), tensor(2, m, c)]
        inputs += [weights(3, masses[0], n, low), weights(4, masses[1], m, low)]
    elif op == "slot_softmax":
        inputs = [tensor(0, g, n, m), weights(1, masses[0], m, dtype, g)]
    elif op == "slot_attention":
        inputs = [tensor(0, g, n, d), tensor(1, m, d), None if masses[1] == "none" else tensor(2, m, c)]
        inputs += [weights(3, masses[0], m, dtype, g), tensor(4, g, n) if seed % 2 else None]
    elif op == "propagate":
        h, w, frames = min(n, 9), min(m, 7), 1 + g
        inputs = [tensor(0, h, w, d), tensor(1, frames, h, w, d), tensor(2, frames, h, w, c)]
    else:
        n = min(n, m)
        inputs = [tensor(0, n, m)]
    return Case(op, inputs, options)


def check_error(case: Case, dtype: torch.dtype, backend: str | None) -> None:
    """Results and gradients of ``backend`` are as near to float64 as those of plain PyTorch in the same dtype.

    At most twice its error, or twice what a rounding of every argument does to the exact result, or what rounding the
    exponents does to the terms of a sum that cancel: a result that plain PyTorch hits by luck is not asked for.
    """
    double = [None if x is None else x.double() for x in case.inputs]
    exact = case.run(double)
    found, own = case.run(backend=backend), case.run()
    rounding = torch.finfo(compute_dtype(dtype)).eps
    known = [x.to(mine.dtype).isfinite() & theirs.isfinite() for x, mine, theirs in zip(exact, found, own, strict=True)]
    results = exact[: len(exact) - sum(x is not None for x in double)]
    bounds, exponent = terms(case, double, results, uppers(results))
    moved = [torch.zeros((), dtype=torch.float64)] * len(exact)
    for seed in range(2):
        shaken = [None if x is None else x * (1 + rounding * _signs(x, seed)) for x in double]
        upper = [u * (1 + rounding * _signs(u, seed)) for u in uppers(results)]
        other = case.run(shaken, upper=upper)
        moved = [
            torch.maximum(most, (x - y)[where].norm())
            for most, x, y, where in zip(moved, other, exact, known, strict=True)
        ]
    factor = 16 if dtype == torch.float64 else 2
    sizes = [x[where].norm() for x, where in zip(exact, known, strict=True)]
    if case.op == "sinkhorn_potentials":
        # Logarithms of sums: near zero they hold what rounding left of a sum of one.
        sizes = [torch.maximum(size, torch.tensor(x.numel() ** 0.5)) for size, x in zip(sizes, exact, strict=True)]
    sizes = sizes[: len(results)] + [
        torch.maximum(size, bound.nan_to_num(0, 0, 0).norm())
        for size, bound in zip(sizes[len(results) :], bounds, strict=True)
    ]
    checked = zip(found, own, exact, moved, known, sizes, strict=True)
    for place, (mine, theirs, wanted, most, where, size) in enumerate(checked):
        assert mine.shape == wanted.shape and mine.dtype == theirs.dtype, place
        assert mine.isfinite()[where].all(), f"{case.op}, result {place}: not finite where it can be"
        error = (mine.double() - wanted)[where].norm()
        relative = 8 * torch.finfo(mine.dtype).eps + factor * exponent * rounding
        least = relative * size + torch.finfo(mine.dtype).tiny * math.sqrt(mine.numel())
        budget = factor * torch.maximum((theirs.double() - wanted)[where].norm(), most) + least
        assert error <= budget, f"{case.op}, result {place}: error {error:.3g}, budget {budget:.3g}, size {size:.3g}"


def _signs(x: Tensor, seed: int) -> Tensor:
    return noise(seed + 1000, *x.shape).sign()
