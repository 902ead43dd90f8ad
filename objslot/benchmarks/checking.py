"""Whether a contestant computes what the operation means: its error against float64, beside PyTorch's own."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from objslot.benchmarks.problem import Call, Problem

# A result may be this many times as far from float64 as eager PyTorch in the same dtype is.
ERROR_RATIO = 2.0
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


def parameters(call: Call) -> list[Tensor]:
    return list(call.parameters()) if isinstance(call, nn.Module) else []


def cotangents(results: Sequence[Tensor]) -> list[Tensor]:
    """Fixed upper gradients for results, uniform in (0, 1)."""
    source = torch.Generator().manual_seed(1)
    return [torch.rand(part.shape, generator=source).to(part.device, part.dtype) for part in results]


def forward(call: Call, problem: Problem) -> list[Tensor]:
    with torch.no_grad():
        return outputs(call(*problem.tensors))


def both(call: Call, problem: Problem, upper: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Gradients of the tensors that have one and, of a module, of its parameters (not returned)."""
    tensors = leaves(problem)
    wanted = [tensors[place] for place in problem.gradients]
    results = [part for part in outputs(call(*tensors)) if part.requires_grad]
    if upper is None:
        upper = cotangents(results)
    found = torch.autograd.grad(results, [*wanted, *parameters(call)], upper, allow_unused=True)
    return list(found[: len(wanted)])


def exact_results(problem: Problem, gradients: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of the definition in float64, at the tensors as they are rounded."""
    precise = Problem(
        tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in problem.tensors),
        problem.settings, problem.exact, problem.exact, problem.exact, problem.gradients, problem.work,
    )  # fmt: skip
    return forward(problem.exact, precise), both(problem.exact, precise) if gradients else []


def error(found: Sequence[Tensor | None], exact: Sequence[Tensor]) -> float:
    """The largest |found - exact| / |exact| of the tensors, Euclidean; infinite for NaN or another shape."""
    worst = 0.0
    for one, other in zip(found, exact, strict=True):
        if one is None or one.shape != other.shape:
            return float("inf")
        size = torch.linalg.vector_norm(other).item()
        distance = torch.linalg.vector_norm(one.detach().double() - other).item()
        relative = distance / size if size else distance
        if not relative < float("inf"):
            return float("inf")
        worst = max(worst, relative)
    return worst


def bound(plain_error: float, dtype: torch.dtype) -> float:
    return max(ERROR_RATIO * plain_error, ROUNDING[dtype])
