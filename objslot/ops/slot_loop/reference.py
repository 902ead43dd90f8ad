"""The definition of slot_loop in plain PyTorch: any device, float32 and float64."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from objslot.ops.slot_attention import reference


class _Step(NamedTuple):
    """What one iteration computed: the slots it started from, and everything on the way."""

    start: Tensor
    normed: tuple[Tensor, Tensor]
    queries: Tensor
    means: Tensor
    logits: Tensor
    updates: Tensor
    gates: tuple[Tensor, ...] | None
    normed_mlp: tuple[Tensor, Tensor]
    hidden: Tensor
    slots: Tensor


def slot_loop(*arguments) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Slots, logits of the last iteration, and those of the iterations before it; arguments as in `autograd`.

    Of differentiable operations; the gradient of the last iteration alone is for `slot_loop_backward`.
    """
    steps, _ = _steps(*arguments)
    return steps[-1].slots, steps[-1].logits, [step.logits for step in steps[:-1]]


def _steps(x, mask, initial, *rest) -> tuple[list[_Step], tuple[Tensor, Tensor]]:
    *layers, scale, eps, iterations = rest
    inputs = _normalised(x, eps[1])
    steps, slots = [], initial
    for _ in range(iterations):
        steps.append(_step(inputs[0], mask, slots, layers, scale, eps))
        slots = steps[-1].slots
    return steps, inputs


def _step(x, mask, start, layers, scale, eps) -> _Step:
    (
        query, query_bias, value, value_bias, norm_slots, norm_slots_bias, norm_mlp, norm_mlp_bias,
        input_gates, hidden_gates, input_gates_bias, hidden_gates_bias, mlp_in, mlp_in_bias, mlp_out, mlp_out_bias,
    ) = layers  # fmt: skip
    normed = _normalised(start, eps[2])
    queries = linear(normed[0] * norm_slots + norm_slots_bias, query, query_bias)
    means, logits, _ = reference.slot_attention(
        queries[..., :-1], x, None, mask, queries[..., -1] * scale, scale, eps[0]
    )
    updates = linear(means, value, value_bias)
    if mask is not None:
        # The bias must not reach a slot that has no position at all.
        updates = updates.masked_fill(~_some(mask), 0)
    if input_gates is None:
        gates, middle = None, start + updates
    else:
        from_input = linear(updates, input_gates, input_gates_bias).chunk(3, -1)
        from_hidden = linear(start, hidden_gates, hidden_gates_bias).chunk(3, -1)
        reset, keep = ((a + b).sigmoid() for a, b in zip(from_input[:2], from_hidden[:2], strict=True))
        new = (from_input[2] + reset * from_hidden[2]).tanh()
        gates, middle = (reset, keep, new, from_hidden[2]), new + keep * (start - new)
    normed_mlp = _normalised(middle, eps[3])
    hidden = linear(normed_mlp[0] * norm_mlp + norm_mlp_bias, mlp_in, mlp_in_bias).relu()
    slots = middle + linear(hidden, mlp_out, mlp_out_bias)
    return _Step(start, normed, queries, means, logits, updates, gates, normed_mlp, hidden, slots)


def slot_loop_backward(
    grad_slots, grad_logits, tensors, scale, eps, iterations, only_last
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors, None for those that are None, of differentiable operations."""
    x, mask, initial, *layers = tensors
    steps, inputs = _steps(*tensors, scale, eps, iterations)
    grad = torch.zeros_like(initial) if grad_slots is None else grad_slots
    totals: list[Tensor | None] = [None] * len(tensors)
    for step in reversed(steps[-1:] if only_last else steps):
        grad, found = _step_backward(grad, grad_logits, step, inputs[0], mask, layers, scale, eps)
        grad_logits = None
        totals = [a if b is None else b if a is None else a + b for a, b in zip(totals, found, strict=True)]
    grad_x = _normalised_backward(totals[0], *inputs)
    if mask is not None:
        grad_x = grad_x.masked_fill((mask == 0).all(-2).unsqueeze(-1), 0)
    totals[0], totals[2] = grad_x, grad
    return tuple(None if tensor is None else total for tensor, total in zip(tensors, totals, strict=True))


def _step_backward(grad, grad_logits, step, x, mask, layers, scale, eps):
    """The gradient of the slots that the step started from, and those of all tensors (None: no part in it)."""
    query, _, value, _, norm_slots, norm_slots_bias, norm_mlp, norm_mlp_bias = layers[:8]
    input_gates, hidden_gates, _, _, mlp_in, _, mlp_out, _ = layers[8:]
    grads: list[Tensor | None] = [None] * (3 + len(layers))

    def layer(index, upper, inner, bias=None):
        grads[3 + index] = upper.flatten(0, -2).mT @ inner.flatten(0, -2)
        grads[3 + (index + 1 if bias is None else bias)] = upper.flatten(0, -2).sum(0)

    def norm(index, upper, normed, weight):
        grads[3 + index] = (upper * normed[0]).flatten(0, -2).sum(0)
        grads[4 + index] = upper.flatten(0, -2).sum(0)
        return _normalised_backward(upper * weight, *normed)

    layer(14, grad, step.hidden)
    grad_hidden = (grad @ mlp_out) * (step.hidden > 0)
    layer(12, grad_hidden, step.normed_mlp[0] * norm_mlp + norm_mlp_bias)
    grad = grad + norm(6, grad_hidden @ mlp_in, step.normed_mlp, norm_mlp)
    if step.gates is None:
        grad_updates, grad_start = grad, grad
    else:
        reset, keep, new, hidden = step.gates
        grad_new = grad * (1 - keep) * (1 - new * new)
        grad_reset = grad_new * hidden * reset * (1 - reset)
        grad_keep = grad * (step.start - new) * keep * (1 - keep)
        from_input = torch.cat([grad_reset, grad_keep, grad_new], -1)
        from_hidden = torch.cat([grad_reset, grad_keep, grad_new * reset], -1)
        layer(8, from_input, step.updates, bias=10)
        layer(9, from_hidden, step.start, bias=11)
        grad_updates, grad_start = from_input @ input_gates, grad * keep + from_hidden @ hidden_gates
    if mask is not None:
        grad_updates = grad_updates.masked_fill(~_some(mask), 0)
    layer(2, grad_updates, step.means)
    constants = step.queries[..., -1] * scale
    grad_query, grads[0], _, grads[1], grad_constant = reference.slot_attention_backward(
        grad_updates @ value, grad_logits, step.queries[..., :-1], x, None, mask, constants, scale, eps[0]
    )
    grad_query = torch.cat([grad_query, grad_constant.unsqueeze(-1) * scale], -1)
    layer(0, grad_query, step.normed[0] * norm_slots + norm_slots_bias)
    return grad_start + norm(4, grad_query @ query, step.normed, norm_slots), grads


def _some(mask: Tensor) -> Tensor:
    return (mask != 0).any(-1)[..., None, None]


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * inverse, inverse


def _normalised_backward(grad: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    return (grad - grad.mean(-1, keepdim=True) - normed * (grad * normed).mean(-1, keepdim=True)) * inverse
