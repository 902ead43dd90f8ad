"""slot_loop by the compiled CPU kernels."""

import torch
from torch import Tensor

from objslot.ops import _native


def forward(x, mask, initial, *rest, statistics=None):
    """Slots, logits, history, and what the backward pass needs, as in `autograd`.

    `statistics`: of the rows of x, from a call before.
    """
    *layers, scale, eps, iterations, kept, return_iterations = rest
    shape, batch = initial.shape, x.shape[:-2].numel()
    rows, width = shape[:-1].numel(), shape[-1]
    logits_shape = (*shape[:-1], x.shape[-2])
    slots, logits = _native.empty(shape, x.dtype), _native.empty(logits_shape, x.dtype)
    history = _native.empty(
        (iterations - 1, *logits_shape) if return_iterations and iterations > 1 else (0,), x.dtype
    )
    measured = statistics is not None
    if not measured:
        statistics = x.new_empty((2, batch, x.shape[-2]))
    before, means = (_native.empty((kept, rows, size), x.dtype) for size in (width, x.shape[-1]))
    mass = x.new_empty((kept, rows))
    gates = _native.empty((kept if layers[8] is not None else 0, rows, 4 * width), x.dtype)
    problem, alive = describe(x, mask, initial, layers, scale, eps)
    start = elements(initial)
    targets = [step.data_ptr() for step in history] if history.dim() > 1 else [0] * (iterations - 1)
    _native.load().slot_loop_forward(
        problem, start.data_ptr(), start.stride(0), iterations, iterations - kept,
        [_kept(k, before, means, mass, gates) for k in range(kept)],
        [part.data_ptr() for part in statistics], measured, eps[1], [*targets, logits.data_ptr()], slots.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    del alive
    return slots, logits, history, statistics, before, means, mass, gates


def backward(grad_slots, grad_logits, tensors, scale, eps, saved, needs, later=None, finish=True):
    """The gradients of `tensors`, None where they are not needed.

    `later`: gradients of x and of the layers, None where there is none, to be added to in their own memory; that of
    x is of the normalised inputs. `finish`: pass the gradient of the normalised inputs back to x.
    """
    x, mask, initial, *layers = tensors
    statistics, before, means, mass, gates = saved
    problem, alive = describe(x, mask, initial, layers, scale, eps)
    add_to_x, *given = (None,) * (1 + len(layers)) if later is None else later
    grad_x = add_to_x
    if grad_x is None and needs[0]:
        grad_x = _native.empty(x.shape, x.dtype)
    grad_mask = mask.new_empty(mask.shape) if needs[1] else None
    grad_initial = _native.empty(initial.shape, x.dtype)
    # Not of recycled memory: optimisers keep them.
    grads = [
        grad if grad is not None or layer is None or not wanted else layer.new_zeros(layer.shape)
        for grad, layer, wanted in zip(given, layers, needs[3:], strict=True)
    ]
    upper = [None if grad is None else grad.contiguous() for grad in (grad_slots, grad_logits)]
    _native.load().slot_loop_backward(
        problem, [_kept(step, before, means, mass, gates) for step in range(len(before))],
        [part.data_ptr() for part in statistics], [_address(grad) for grad in upper],
        grad_initial.data_ptr(), _address(grad_x), add_to_x is not None, finish, _address(grad_mask),
        [_address(grad) for grad in grads], torch.get_num_threads(),
    )  # fmt: skip
    del alive
    return [grad_x, grad_mask, grad_initial, *grads]


def describe(x, mask, initial, layers, scale, eps):
    """What the kernels are called with, and the tensors whose memory it points to."""
    *_, groups, slots, width = initial.shape
    x, mask = _flat(x, 2), None if mask is None else _flat(mask, 2)
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    if mask is not None and not mask[:1].is_contiguous():
        mask = mask.contiguous()
    layers = [None if layer is None else layer.contiguous() for layer in layers]
    sizes = [x.shape[0], groups, slots, x.shape[1], width, x.shape[2], layers[12].shape[0]]
    softmax_eps, _, slots_eps, mlp_eps = eps
    problem = _native.load().SlotLoopProblem(
        _native.ELEMENTS[x.dtype], sizes, x.data_ptr(), [x.stride(0), x.stride(1)],
        _address(mask), 0 if mask is None else mask.stride(0), [scale, softmax_eps, slots_eps, mlp_eps],
        [_address(layer) for layer in layers],
    )  # fmt: skip
    return problem, (x, mask, layers)


def _kept(step, before, means, mass, gates):
    return [
        before[step].data_ptr(),
        means[step].data_ptr(),
        mass[step].data_ptr(),
        gates[step].data_ptr() if len(gates) else 0,
    ]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def elements(initial: Tensor) -> Tensor:
    """Initial slots with one batch dimension, of any stride, and elements that are contiguous."""
    initial = _flat(initial, 3)
    return initial if initial[:1].is_contiguous() else initial.contiguous()


def _flat(x: Tensor, trailing: int) -> Tensor:
    return x.reshape(x.shape[: x.dim() - trailing].numel(), *x.shape[x.dim() - trailing :])
