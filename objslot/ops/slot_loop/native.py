"""slot_loop by the compiled CPU kernels; the gradients of the layers' matrices are products by PyTorch."""

import torch
from torch import Tensor

from objslot.ops import _native


def forward(x, mask, initial, *rest):
    """Slots, logits, history, and what the backward pass needs, as in `autograd`."""
    *layers, scale, eps, iterations, kept, return_iterations = rest
    shape, batch = initial.shape, x.shape[:-2].numel()
    rows, width = shape[:-1].numel(), shape[-1]
    logits_shape = (*shape[:-1], x.shape[-2])
    slots, logits = _native.empty(shape, x.dtype), _native.empty(logits_shape, x.dtype)
    history = _native.empty(
        (iterations - 1, *logits_shape) if return_iterations and iterations > 1 else (0,), x.dtype
    )
    statistics = x.new_empty((2, batch, x.shape[-2]))
    before, means = (_native.empty((kept, rows, size), x.dtype) for size in (width, x.shape[-1]))
    mass = x.new_empty((kept, rows))
    gates = _native.empty((kept if layers[8] is not None else 0, rows, 4 * width), x.dtype)
    problem, alive = describe(x, mask, initial, layers, scale, eps)
    start = initial.contiguous()
    targets = [step.data_ptr() for step in history] if history.dim() > 1 else [0] * (iterations - 1)
    _native.load().slot_loop_forward(
        problem, start.data_ptr(), iterations, iterations - kept,
        [_kept(k, before, means, mass, gates) for k in range(kept)],
        [part.data_ptr() for part in statistics], eps[1], [*targets, logits.data_ptr()], slots.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    del alive
    return slots, logits, history, statistics, before, means, mass, gates


def backward(grad_slots, grad_logits, tensors, scale, eps, saved, needs):
    """The gradients of `tensors`, empty where they are not needed."""
    x, mask, initial, *layers = tensors
    statistics, before, means, mass, gates = saved
    kept, rows, width = before.shape
    input_width, hidden = x.shape[-1], layers[12].shape[0]
    gru = layers[8] is not None
    module = _native.load()
    problem, alive = describe(x, mask, initial, layers, scale, eps)
    packed = _native.empty((module.slot_loop_packed_size(problem),), x.dtype)
    grad_x = _native.empty(x.shape, x.dtype) if needs[0] else None
    grad_mask = mask.new_empty(mask.shape) if needs[1] else None
    grad = initial.new_zeros((rows, width)) if grad_slots is None else grad_slots.reshape(rows, width).contiguous()
    grad_logits = None if grad_logits is None else grad_logits.contiguous()
    spare = [_native.empty((rows, width), x.dtype) for _ in range(min(kept, 2))]

    def matrix(columns):
        return _native.empty((rows, columns), x.dtype)

    normed_slots, grad_query, grad_constant = matrix(width), matrix(input_width), matrix(1)
    updates, grad_updates, grad_gates = matrix(width), matrix(width), matrix(4 * width) if gru else None
    normed_mlp, hiddens, grad_hidden = matrix(width), matrix(hidden), matrix(hidden)
    matrices = (
        normed_slots, grad_query, grad_constant, updates, grad_updates, grad_gates, normed_mlp, hiddens, grad_hidden
    )  # fmt: skip
    sizes = [width] * 4 + [input_width + 1, width, 4 * width * gru, hidden, width]
    sums = x.new_zeros(sum(sizes)).split(sizes)
    products = _Products(layers, needs[3:])
    for step in reversed(range(kept)):
        start = spare[step % 2]
        first = step == kept - 1
        module.slot_loop_backward(
            problem, packed.data_ptr(), first, _kept(step, before, means, mass, gates),
            [part.data_ptr() for part in statistics],
            [grad.data_ptr(), grad_logits.data_ptr() if first and grad_logits is not None else 0],
            start.data_ptr(), _address(grad_x), not first, step == 0, _address(grad_mask), not first,
            [_address(value) for value in matrices], [value.data_ptr() if len(value) else 0 for value in sums],
            torch.get_num_threads(),
        )  # fmt: skip
        products.add(0, grad_query, normed_slots, slice(input_width))
        products.add(0, grad_constant, normed_slots, slice(input_width, None))
        products.add(2, grad_updates, means[step])
        if gru:
            products.add(8, grad_gates[:, : 3 * width], updates)
            products.add(9, grad_gates[:, : 2 * width], before[step], slice(2 * width))
            products.add(9, grad_gates[:, 3 * width :], before[step], slice(2 * width, None))
        products.add(12, grad_hidden, normed_mlp)
        products.add(14, grad, hiddens)
        grad = start
    del alive
    norm_slots, norm_slots_bias, norm_mlp, norm_mlp_bias, query_bias, value_bias, gate_bias, mlp_in, mlp_out = sums
    hidden_bias = torch.cat([gate_bias[: 2 * width], gate_bias[3 * width :]]) if gru else gate_bias
    vectors = {
        1: query_bias, 3: value_bias, 4: norm_slots, 5: norm_slots_bias, 6: norm_mlp, 7: norm_mlp_bias,
        10: gate_bias[: 3 * width], 11: hidden_bias, 13: mlp_in, 15: mlp_out,
    }  # fmt: skip
    # Parts of one tensor: a result of an op may not share memory with another.
    found = [vectors[k].clone() if k in vectors else products.grads[k] for k in range(16)]
    results = [grad_x, grad_mask, grad.reshape(initial.shape), *found]
    return tuple(result if wanted else x.new_empty(0) for result, wanted in zip(results, needs, strict=True))


class _Products:
    """The gradients of the matrices among the layers, sums of products over iterations."""

    def __init__(self, layers, needs):
        self.grads = [
            layer.new_empty(layer.shape) if wanted and layer is not None and layer.dim() == 2 else None
            for layer, wanted in zip(layers, needs, strict=True)
        ]
        self.filled = set()

    def add(self, index: int, outer: Tensor, inner: Tensor, part: slice = slice(None)) -> None:
        """Add outer^T inner to the rows `part` of the gradient of layer `index`."""
        if self.grads[index] is None:
            return
        key = (index, part.start)
        self.grads[index][part].addmm_(outer.mT, inner, beta=int(key in self.filled))
        self.filled.add(key)


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


def _flat(x: Tensor, trailing: int) -> Tensor:
    return x.reshape(x.shape[: x.dim() - trailing].numel(), *x.shape[x.dim() - trailing :])
