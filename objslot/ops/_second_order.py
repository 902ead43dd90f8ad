"""Second derivatives of an op, taken through the plain PyTorch form of its gradient."""

from collections.abc import Callable

import torch
from torch import Tensor


def register_second_order(name: str, gradients: Callable[..., tuple[Tensor | None, ...]], lib) -> None:
    """Make the backward op `name` differentiable: its own backward is autograd through `gradients`.

    `gradients` takes the arguments of the op and returns its results, built of differentiable operations.
    """

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(inputs[place] for place in ctx.places))
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx, *grads):
        inputs = list(ctx.constants)
        with torch.enable_grad():
            for place, saved in zip(ctx.places, ctx.saved_tensors, strict=True):
                inputs[place] = saved.view_as(saved) if saved.requires_grad else saved
            outputs = gradients(*inputs)
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output is not None and output.requires_grad
        ]
        wanted = [place for place in ctx.places if ctx.needs_input_grad[place]]
        results: list[Tensor | None] = [None] * len(inputs)
        if pairs and wanted:
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [inputs[place] for place in wanted],
                [grad for _, grad in pairs],
                allow_unused=True,
                create_graph=torch.is_grad_enabled(),
            )
            for place, grad in zip(wanted, found, strict=True):
                results[place] = grad
        return tuple(results)

    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=lib)
