"""Whether a contestant computes what the operation means: its error against float64, beside PyTorch's own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from objslot.benchmarks.problem import Call, Problem

# A result may be this many times as far from float64 as eager PyTorch in the same dtype is.
ERROR_RATIO = 2.0
# A peer that exceeds the bound no further than this is timed all the same, and labelled.
RIVAL_RATIO = 10.0
# Times the largest tensor: smaller ones vanish but for rounding.
NOTHING = 1e-9
# Errors below these count as rounding, whatever PyTorch's own error is.
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


def outputs(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]


def leaves(problem: Problem) -> tuple[Tensor, ...]:
    """The tensors of a problem, those with gradients detached and asking for them."""
    return tuple(
        tensor.detach().requires_grad_() if place in problem.gradients else tensor
        for place, tensor in enumerate(problem.tensors)
    )


def parameters(call: Call) -> dict[str, Tensor]:
    """What learns in a module, under the names that it had before it was wrapped."""
    if not isinstance(call, nn.Module):
        return {}
    return {re.sub("^(_orig_mod|call)[.]", "", name): parameter for name, parameter in call.named_parameters()}


def cotangents(results: Sequence[Tensor]) -> list[Tensor]:
    """Fixed upper gradients for results, uniform in (0, 1)."""
    source = torch.Generator().manual_seed(1)
    return [torch.rand(part.shape, generator=source).to(part.device, part.dtype) for part in results]


def forward(call: Call, problem: Problem) -> list[Tensor]:
    with torch.no_grad():
        return outputs(call(*problem.tensors))


def both(call: Call, problem: Problem, upper: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """Gradients of a forward and backward pass: of the tensors, by their places, and of a module's parameters."""
    tensors, learned = leaves(problem), parameters(call)
    wanted = {str(place): tensors[place] for place in problem.gradients} | learned
    results = [part for part in outputs(call(*tensors)) if part.requires_grad]
    found = torch.autograd.grad(results, list(wanted.values()), upper or cotangents(results), allow_unused=True)
    return {name: gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None}


@dataclass(frozen=True)
class Exact:
    """What the definition gives in float64, at the tensors as they are rounded."""

    results: list[Tensor]
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, problem: Problem) -> "Exact":
        tensors = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in problem.tensors)
        precise = replace(problem, tensors=tensors)
        gradients = both(problem.exact, precise) if problem.gradients else {}
        return cls(forward(problem.exact, precise), gradients)

    def errors(self, call: Call, problem: Problem) -> dict[str, float]:
        """Of the results, and of results and gradients together.

        The gradients of parameters are compared where the contestant has a parameter of the same name and shape;
        those of the tensors must be there.
        """
        own = error(forward(call, problem), self.results)
        errors = {"forward": own}
        if self.gradients:
            found = both(call, problem)
            names = [
                name
                for name, exact in self.gradients.items()
                if name.isdigit() or (name in found and found[name].shape == exact.shape)
            ]
            gradients = error([found.get(name) for name in names], [self.gradients[name] for name in names])
            errors["forward+backward"] = max(own, gradients)
        return errors


def error(found: Sequence[Tensor | None], exact: Sequence[Tensor]) -> float:
    """The largest |found - exact| / |exact| of the tensors, Euclidean; infinite for NaN or another shape.

    What is nothing beside the largest of the tensors is measured by that one: a gradient that vanishes, as that of the
    bias of all queries does, is rounding in float64 too.
    """
    if len(found) != len(exact):
        return float("inf")
    sizes = [torch.linalg.vector_norm(other.double()).item() for other in exact]
    worst, largest = 0.0, max(sizes, default=0.0)
    for one, other, size in zip(found, exact, sizes, strict=True):
        if one is None or one.shape != other.shape:
            return float("inf")
        if size < NOTHING * largest:
            size = largest
        distance = torch.linalg.vector_norm(one.detach().double() - other).item()
        relative = distance / size if size else distance
        if not relative < float("inf"):
            return float("inf")
        worst = max(worst, relative)
    return worst


def bound(plain_error: float, dtype: torch.dtype) -> float:
    return max(ERROR_RATIO * plain_error, ROUNDING[dtype])
