"""Registration of objslot::slot_loop: schema, choice of backend, fake, gradient."""

import torch
from torch import Tensor

from objslot.ops import _autocast, _backends, _native
from objslot.ops._second_order import register_second_order
from objslot.ops.slot_loop import native, reference

_LAYERS = (
    "Tensor query, Tensor? query_bias, Tensor value, Tensor? value_bias, Tensor norm_slots, Tensor norm_slots_bias, "
    "Tensor norm_mlp, Tensor norm_mlp_bias, Tensor? input_gates, Tensor? hidden_gates, Tensor? input_gates_bias, "
    "Tensor? hidden_gates_bias, Tensor mlp_in, Tensor mlp_in_bias, Tensor mlp_out, Tensor mlp_out_bias"
)
_TENSORS = f"Tensor x, Tensor? mask, Tensor initial, {_LAYERS}"
_INPUTS = f"{_TENSORS}, float scale, float[4] eps, int iterations, bool only_last"
_COUNT = 19
_KEPT = ("statistics", "slots_before", "means", "mass", "gates")

_lib = torch.library.Library("objslot", "FRAGMENT")
# `kept`: for how many of the last iterations to keep what the backward pass needs.
_lib.define(
    f"slot_loop({_INPUTS}, int kept, bool return_iterations, str? backend) -> (Tensor slots, Tensor logits, "
    f"Tensor history, {', '.join(f'Tensor {name}' for name in _KEPT)})"
)
# `needs` says which of the gradients of the tensors are wanted; the others come back empty.
_lib.define(
    f"slot_loop_backward(Tensor? grad_slots, Tensor? grad_logits, {_INPUTS}, "
    f"{', '.join(f'Tensor {name}' for name in _KEPT)}, bool[{_COUNT}] needs, str? backend) -> "
    f"({', '.join(f'Tensor grad_{index}' for index in range(_COUNT))})"
)

_backends.register("slot_loop", "reference", lambda **facts: None)
_backends.register("slot_loop", "cpu", _native.why_not_cpu)


def facts(x: Tensor) -> dict:
    """What the table of backends is asked with."""
    return {"device": x.device, "dtype": x.dtype, "positions": x.shape[-2], "input_width": x.shape[-1]}


def layer_sizes(width: int, input_width: int, hidden: int) -> list[tuple[int, ...]]:
    """The shapes of the layers, in their order."""
    return [
        (input_width + 1, width), (input_width + 1,), (width, input_width), (width,),
        (width,), (width,), (width,), (width,),
        (3 * width, width), (3 * width, width), (3 * width,), (3 * width,),
        (hidden, width), (hidden,), (width, hidden), (width,),
    ]  # fmt: skip


def _forward(*arguments):
    *tensors, scale, eps, iterations, _, kept, return_iterations, backend = arguments
    x, _, initial, *_ = tensors
    if _backends.select("slot_loop", backend, **facts(x)) == "cpu":
        return native.forward(*tensors, scale, eps, iterations, kept, return_iterations)
    with _autocast.disabled(x.device):
        slots, logits, history = reference.slot_loop(*tensors, scale, eps, iterations)
    history = torch.stack(history) if return_iterations and history else x.new_empty(0)
    results = [slots.contiguous(), logits.contiguous(), history]
    # Nothing is kept: the backward pass of the reference begins anew.
    return (*results, *(x.new_zeros(size) for size in _kept_sizes(x, initial, tensors[11], kept)))


def _backward(grad_slots, grad_logits, *arguments):
    *tensors, needs, backend = arguments
    tensors, (scale, eps, iterations, only_last), kept = tensors[:_COUNT], tensors[_COUNT:-5], tensors[-5:]
    x = tensors[0]
    if _backends.select("slot_loop", backend, **facts(x)) == "cpu":
        grads = native.backward(grad_slots, grad_logits, tensors, scale, eps, kept, needs)
        return tuple(grad if wanted else x.new_empty(0) for grad, wanted in zip(grads, needs, strict=True))
    with _autocast.disabled(x.device):
        grads = reference.slot_loop_backward(
            grad_slots, grad_logits, tensors, scale, eps, iterations, only_last
        )
    return tuple(
        grad.contiguous() if wanted else x.new_empty(0) for grad, wanted in zip(grads, needs, strict=True)
    )


def _kept_sizes(x, initial, input_gates, kept):
    batch, rows, width = x.shape[:-2].numel(), initial.shape[:-1].numel(), initial.shape[-1]
    return [
        (2, batch, x.shape[-2]),
        (kept, rows, width),
        (kept, rows, x.shape[-1]),
        (kept, rows),
        (kept if input_gates is not None else 0, rows, 4 * width),
    ]


def _fake_forward(*arguments):
    *tensors, _, _, iterations, _, kept, return_iterations, _ = arguments
    x, _, initial, *_ = tensors
    logits = (*initial.shape[:-1], x.shape[-2])
    history = (iterations - 1, *logits) if return_iterations and iterations > 1 else 0
    sizes = [initial.shape, logits, history, *_kept_sizes(x, initial, tensors[11], kept)]
    return tuple(x.new_empty(size) for size in sizes)


def _fake_backward(grad_slots, grad_logits, *arguments):
    *tensors, needs, _ = arguments
    return tuple(
        like.new_empty(like.shape) if wanted else tensors[0].new_empty(0)
        for like, wanted in zip(tensors[:_COUNT], needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    tensors, ctx.settings, ctx.backend = inputs[:_COUNT], inputs[_COUNT : _COUNT + 4], inputs[-1]
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_slots, grad_logits, *_):
    needs = list(ctx.needs_input_grad[:_COUNT])
    if grad_slots is None and grad_logits is None:
        return (None,) * (_COUNT + 7)
    saved = ctx.saved_tensors
    grads = torch.ops.objslot.slot_loop_backward(
        grad_slots, grad_logits, *saved[:_COUNT], *ctx.settings, *saved[_COUNT:], needs, ctx.backend
    )
    return (*(grad if wanted else None for grad, wanted in zip(grads, needs, strict=True)), *(None,) * 7)


class _Direct(torch.autograd.Function):
    """The op on tensors that need no dispatcher; hands x and the layers, as far as they take gradients, on.

    The gradients of the next call on them come back in memory of their own, which is added to. `follows`: x was
    handed on by another call, which wants the gradient of the normalised inputs.
    """

    @staticmethod
    def forward(ctx, settings, kept, return_iterations, statistics, follows, *tensors):
        found = native.forward(*tensors, *settings[:3], kept, return_iterations, statistics=statistics)
        ctx.settings, ctx.follows = settings, follows
        ctx.save_for_backward(*tensors, *found[3:])
        ctx.mark_non_differentiable(*found[2:4])
        ctx.set_materialize_grads(False)
        learned = zip(tensors, ctx.needs_input_grad[-_COUNT:], strict=True)
        x, _, _, *layers = (tensor if wanted else None for tensor, wanted in learned)
        return *found[:4], x, *layers

    @staticmethod
    def backward(ctx, grad_slots, grad_logits, _, __, *later):
        if all(grad is None for grad in (grad_slots, grad_logits, *later)):
            return (None,) * (5 + _COUNT)
        needs, saved = list(ctx.needs_input_grad[-_COUNT:]), ctx.saved_tensors
        tensors, kept = saved[:_COUNT], saved[_COUNT:]
        if torch.is_grad_enabled():
            # The other call passes its gradient through the norm, too.
            grads = torch.ops.objslot.slot_loop_backward(
                grad_slots, grad_logits, *tensors, *ctx.settings, *kept, needs, "cpu"
            )
            later = (later[0], None, None, *later[1:])
            grads = [grad if more is None else grad + more for grad, more in zip(grads, later, strict=True)]
        else:
            grads = native.backward(
                grad_slots, grad_logits, tensors, *ctx.settings[:2], kept, needs, later, not ctx.follows
            )
        return (None,) * 5 + tuple(grad if wanted else None for grad, wanted in zip(grads, needs, strict=True))


def direct(tensors, settings, kept, return_iterations, statistics, follows):
    """Slots, logits, history, statistics, and x and layers to give to the next call on them."""
    x, _, _, *layers = tensors
    if kept == 0:
        found = native.forward(*tensors, *settings[:3], 0, return_iterations, statistics=statistics)
        return *found[:4], (x, *layers)
    found = _Direct.apply(settings, kept, return_iterations, statistics, follows, *tensors)
    handed = (own if alias is None else alias for own, alias in zip((x, *layers), found[4:], strict=True))
    return *found[:4], tuple(handed)


def _differentiable_backward(grad_slots, grad_logits, *arguments):
    *tensors, needs, _ = arguments
    scale, eps, iterations, only_last = tensors[_COUNT : _COUNT + 4]
    grads = reference.slot_loop_backward(
        grad_slots, grad_logits, tensors[:_COUNT], scale, eps, iterations, only_last
    )
    return tuple(grad if wanted else None for grad, wanted in zip(grads, needs, strict=True))


_lib.impl("slot_loop", _forward, "CompositeExplicitAutograd")
_lib.impl("slot_loop_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("objslot::slot_loop", _fake_forward, lib=_lib)
torch.library.register_fake("objslot::slot_loop_backward", _fake_backward, lib=_lib)
torch.library.register_autograd("objslot::slot_loop", _gradients, setup_context=_setup_context, lib=_lib)
register_second_order("objslot::slot_loop_backward", _differentiable_backward, _lib)
