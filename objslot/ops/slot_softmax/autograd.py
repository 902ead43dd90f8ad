"""Registration of objslot::slot_softmax: schema, choice of backend, fake, gradient."""

import torch
from torch import Tensor

from objslot.ops import _autocast, _backends, _direct, _native, _triton
from objslot.ops._arithmetic import compute_dtype
from objslot.ops._second_order import register_second_order
from objslot.ops._vmap import register_vmap
from objslot.ops.slot_softmax import native, reference

_lib = torch.library.Library("objslot", "FRAGMENT")
_lib.define("slot_softmax(Tensor logits, Tensor? mask, float eps, str? backend) -> (Tensor weights, Tensor mass)")
_lib.define(
    "slot_softmax_backward(Tensor grad, Tensor logits, Tensor? mask, Tensor mass, float eps, bool needs_mask, "
    "str? backend) -> (Tensor grad_logits, Tensor grad_mask)"
)

_backends.register("slot_softmax", "reference", lambda **facts: None)
_backends.register("slot_softmax", "cpu", _native.why_not_cpu)
_backends.register("slot_softmax", "triton", _triton.why_not(__package__), automatic=False)


def facts(logits: Tensor) -> dict:
    """What the table of backends is asked with."""
    *_, groups, slots, positions = logits.shape
    return {
        "device": logits.device,
        "dtype": logits.dtype,
        "groups": groups,
        "slots": slots,
        "positions": positions,
    }


def _kernels(logits, backend):
    """The module of kernels that serves the call, None for the reference."""
    name = _backends.select("slot_softmax", backend, **facts(logits))
    if name == "triton":
        return _triton.kernels(__package__)
    return native if name == "cpu" else None


def _forward(logits, mask, eps, backend):
    kernels = _kernels(logits, backend)
    if kernels is not None:
        return kernels.forward(logits, mask, eps)
    with _autocast.disabled(logits.device):
        weights, mass = reference.slot_softmax(logits, mask, eps)
    return weights.contiguous(), mass.contiguous()


def _backward(grad, logits, mask, mass, eps, needs_mask, backend):
    kernels = _kernels(logits, backend)
    if kernels is not None:
        return kernels.backward(grad, logits, mask, mass, eps, needs_mask)
    with _autocast.disabled(logits.device):
        grad_logits, grad_mask = reference.slot_softmax_backward(grad, logits, mask, eps, needs_mask)
    return grad_logits.contiguous(), logits.new_empty(0) if grad_mask is None else grad_mask.contiguous()


def _fake_forward(logits, mask, eps, backend):
    return (
        logits.new_empty(logits.shape),
        logits.new_empty(logits.shape[:-1], dtype=compute_dtype(logits.dtype)),
    )


def _fake_backward(grad, logits, mask, mass, eps, needs_mask, backend):
    return logits.new_empty(logits.shape), mask.new_empty(mask.shape) if needs_mask else logits.new_empty(0)


def _setup_context(ctx, inputs, output):
    logits, mask, ctx.eps, ctx.backend = inputs
    _, mass = output
    ctx.save_for_backward(logits, mask, mass)
    ctx.mark_non_differentiable(mass)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    logits, mask, mass = ctx.saved_tensors
    needs_mask = ctx.needs_input_grad[1]
    if ctx.backend == "cpu" and not torch.is_grad_enabled() and _direct.possible(grad, logits, mask):
        grad_logits, grad_mask = native.backward(grad, logits, mask, mass, ctx.eps, needs_mask)
    else:
        grad_logits, grad_mask = torch.ops.objslot.slot_softmax_backward(
            grad, logits, mask, mass, ctx.eps, needs_mask, ctx.backend
        )
    return grad_logits, grad_mask if needs_mask else None, None, None


class _Direct(torch.autograd.Function):
    """The op on tensors that need no dispatcher."""

    @staticmethod
    def forward(ctx, logits, mask, eps, backend):
        found = native.forward(logits, mask, eps)
        _setup_context(ctx, (logits, mask, eps, backend), found)
        return found

    backward = staticmethod(_gradients)


def slot_softmax(logits, mask, eps, backend):
    """The weights, by the shortest way."""
    if backend is None and _direct.possible(logits, mask):
        if torch.is_grad_enabled() and (logits.requires_grad or (mask is not None and mask.requires_grad)):
            return _Direct.apply(logits, mask, eps, "cpu")[0]
        return native.forward(logits, mask, eps)[0]
    return torch.ops.objslot.slot_softmax(logits, mask, eps, backend)[0]


def _differentiable_backward(grad, logits, mask, mass, eps, needs_mask, backend):
    return reference.slot_softmax_backward(grad, logits, mask, eps, needs_mask)


_lib.impl("slot_softmax", _forward, "CompositeExplicitAutograd")
_lib.impl("slot_softmax_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("objslot::slot_softmax", _fake_forward, lib=_lib)
torch.library.register_fake("objslot::slot_softmax_backward", _fake_backward, lib=_lib)
torch.library.register_autograd("objslot::slot_softmax", _gradients, setup_context=_setup_context, lib=_lib)
register_second_order("objslot::slot_softmax_backward", _differentiable_backward, _lib)
register_vmap("slot_softmax", _lib)
register_vmap("slot_softmax_backward", _lib)
